#pragma once

#include "../core/backend.h"

// Kernels of one head dim tile, in translation units of their own (compiled with FAE_HEAD_DIM, and FAE_DTYPE where they
// are of one type: both together take a compiler more than a minute).

namespace fae::sm90 {

template <DType kType, int kHeadDim>
void forward(const Problem& p, const Execution& execution);

template <DType kType, int kHeadDim>
size_t backward_workspace(const BackwardProblem& p);
template <DType kType, int kHeadDim>
void backward(const BackwardProblem& p, const Execution& execution);

// dbias of a bias of any shape; `workspace` holds what bias_gradient_workspace asks for.
template <int kHeadDim>
size_t bias_gradient_workspace(const BackwardProblem& p);
template <int kHeadDim>
void bias_gradient(const BackwardProblem& p, void* workspace, void* stream);

}  // namespace fae::sm90
