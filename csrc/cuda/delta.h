#pragma once

#include "../core/backend.h"

namespace fae::cuda {

// What runs before a backward kernel, in one launch:
// - p.delta = rowsum(dout * out) - dlse, for all rows.
// - `counters` int32 numbers become zero.
// - cu_seqlens, where given, are copied to `cu_seqlens_q` and `cu_seqlens_k` as what every reader can rely on: they
//   begin at 0 or later, never decrease, and end within the tensors.
// - dq becomes zero in rows of dense tensors that see no key, for which no kernel will come.
struct BackwardPreparation {
  BackwardProblem p;
  int* counters = nullptr;
  int64_t counter_count = 0;
  int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  bool unseen_rows = false;  // whether there may be any of the last kind; prepare_backward finds out
};
void prepare_backward(BackwardPreparation preparation, const Execution& execution);

// A sink is a key without a value: dsink = -sum over rows of P_sink * delta,  P_sink = exp(sink - lse).
void compute_dsinks(const BackwardProblem& p, const Execution& execution);

}  // namespace fae::cuda
