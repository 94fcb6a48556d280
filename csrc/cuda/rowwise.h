#pragma once

#include "../core/rowwise.h"

namespace fae::cuda {

void softmax(const SoftmaxArgs& args, const Execution& execution);
void softmax_backward(const SoftmaxArgs& args, const Execution& execution);
void merge(const MergeArgs& args, const Execution& execution);
void merge_backward(const MergeArgs& args, const Execution& execution);

}  // namespace fae::cuda
