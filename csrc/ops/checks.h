#pragma once

#include "ops.h"

// Validation of every op, here and nowhere else. Each check raises one error that lists all unmet constraints.

namespace fae::ops {

// The sizes of a valid call.
struct Extents {
  bool packed = false;
  int64_t batch = 0, rows_q = 0, rows_k = 0;  // rows: of each sequence when dense, of all of them when packed
  int64_t heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  // Dense: the rows. Packed: the longest sequence where lengths can be read without waiting for a device, else the hint
  // max_seqlen, else all rows.
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;

  Sizes out_sizes() const {
    return packed ? Sizes{rows_q, heads, head_dim_v} : Sizes{batch, rows_q, heads, head_dim_v};
  }
  Sizes lse_sizes() const { return packed ? Sizes{heads, rows_q} : Sizes{batch, heads, rows_q}; }
};

Extents check_forward(const Inputs&);
Extents check_backward(const Inputs&, const Gradients&);
void check_softmax(const Tensor& x);
void check_softmax_backward(const Tensor& dy, const Tensor& y);
void check_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b);
void check_merge_backward(const Tensor& dout, const Tensor& dlse, const Tensor& out_a, const Tensor& lse_a,
                          const Tensor& out_b, const Tensor& lse_b, const Tensor& out, const Tensor& lse);

}  // namespace fae::ops
