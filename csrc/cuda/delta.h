#pragma once

#include "backward_space.h"
#include "device.h"

namespace fae::cuda {

// What a backward kernel finds beside the rows of dO.
struct RowStatistics {
  // [batch, group of rows, head] in units of 16 bytes: one for each row of a group of 2^group_bits, side by side.
  TensorView rows;
  int group_bits = 0;
  // For products: -lse / (2 scale) and -delta / 2, each as a sum of three bfloat16 numbers, and two zeros. A product of
  // 16 columns with (1, 1, 1, 0, 0, 0, 0, 0) twice gives -lse / scale, one with (0, 0, 0, 1, 1, 1, 0, 0) twice gives
  // -delta. Otherwise: lse * log2 e (0 of a row without keys) and delta, as float, and 8 bytes that mean nothing.
  bool folded = false;
  float delta_weight = 1;  // of delta among folded statistics: 1 / kept_weight, where that comes with the results
};

// What runs before a backward kernel, in one launch; returns the problem for that kernel, in terms of `space`:
// - delta = rowsum(dout * out) - dlse, for all rows; it is kept where `space` has a place for it.
// - `statistics.rows`, where they have a place, become what `statistics` says.
// - The counters become zero.
// - cu_seqlens, where given, are copied as what every reader can rely on: they begin at 0 or later, never decrease, and
//   end within the tensors. The tasks of these sequences are put into `order`.
BackwardProblem prepare_backward(const BackwardProblem& problem, const BackwardSpace& space, RowStatistics statistics,
                                 const TaskOrder& order, const Execution& execution);

// A sink is a key without a value: dsink = -sum over rows of P_sink * delta,  P_sink = exp(sink - lse).
void compute_dsinks(const BackwardProblem& p, const Execution& execution);

}  // namespace fae::cuda
