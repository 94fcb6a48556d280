#pragma once

#include "../core/backend.h"

// Kernels of one head dim tile, in a translation unit of their own (compiled with FAE_HEAD_DIM).

namespace fae::sm80 {

template <int kHeadDim>
void forward(const Problem& p, const Execution& execution);

template <int kHeadDim>
size_t backward_workspace(const BackwardProblem& p);
template <int kHeadDim>
void backward(const BackwardProblem& p, const Execution& execution);

// dbias of a bias of any shape; `workspace` holds what bias_gradient_workspace asks for.
template <int kHeadDim>
size_t bias_gradient_workspace(const BackwardProblem& p);
template <int kHeadDim>
void bias_gradient(const BackwardProblem& p, void* workspace, void* stream);

// Whether several scores share an element of a matrix.
inline bool broadcasts(const Problem& p, const ScoreView& view) {
  return view.size_batch < p.batch || view.size_head < p.heads || (view.size_row == 1 && p.max_seqlen_q > 1) ||
         (view.size_col == 1 && p.max_seqlen_k > 1);
}

}  // namespace fae::sm80
