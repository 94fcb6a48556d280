#pragma once

#include "backend.h"

// The two operations beside attention, softmax and merge: both walk over independent rows.

namespace fae {

// softmax over rows of `cols` contiguous elements, and its gradient dx = y * (dy - sum(dy * y)).
struct SoftmaxArgs {
  DType dtype = DType::float32;
  const void* x = nullptr;  // forward: input; backward: dy
  const void* y = nullptr;  // backward: the forward's output
  void* result = nullptr;
  int64_t rows = 0, cols = 0;
};

// Attention over two sets of keys joined into attention over their union; every out has head_dim_v contiguous columns.
// Packed tensors are a batch of one. Gradients, with w = exp(lse_a - lse) and b likewise:
//   dout_a = w * dout    dlse_a = w * (dlse + dout . (out_a - out))
struct MergeArgs {
  DType dtype = DType::float32;
  int64_t batch = 0, rows = 0, heads = 0, head_dim_v = 0;
  TensorView out_a, out_b, out;
  StatsView lse_a, lse_b, lse;
  // backward only
  TensorView dout, dout_a, dout_b;
  StatsView dlse, dlse_a, dlse_b;
};

// What a device offers for them.
struct RowwiseKernels {
  void (*softmax)(const SoftmaxArgs&, const Execution&) = nullptr;
  void (*softmax_backward)(const SoftmaxArgs&, const Execution&) = nullptr;
  void (*merge)(const MergeArgs&, const Execution&) = nullptr;
  void (*merge_backward)(const MergeArgs&, const Execution&) = nullptr;
};

}  // namespace fae
