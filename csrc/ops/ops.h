#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

// The ops: one implementation for every device. Shapes and meaning of the arguments: the schemas in library.cpp.

namespace fae::ops {

// What forward and backward share.
struct Inputs {
  Tensor q, k, v;
  MaybeTensor bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, rng_state;
  MaybeInt max_seqlen_q, max_seqlen_k, window_left, window_right;
  double softmax_scale = 1, softcap = 0, dropout_p = 0;
  bool allow_tf32 = false;

  bool packed() const { return cu_seqlens_q || cu_seqlens_k; }
};

// What backward takes besides.
struct Gradients {
  Tensor dout;
  MaybeTensor dlse;
  Tensor out, lse;
  bool deterministic = true, bias_requires_grad = false;
};

// What forward checks, and nothing else; returns the batch and the longest sequences, as far as they are known.
std::tuple<int64_t, int64_t, int64_t> check(Inputs in);
std::tuple<Tensor, Tensor> forward(Inputs in);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Inputs in, Gradients g);
Tensor softmax(Tensor x);
Tensor softmax_backward(Tensor dy, Tensor y);
std::tuple<Tensor, Tensor> merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a,
                                                          Tensor out_b, Tensor lse_b, Tensor out, Tensor lse);

// Registers all of them under one dispatch key: CPU in this library, CUDA in the CUDA library.
FAE_API void register_ops(torch::stable::detail::StableLibrary& library);

}  // namespace fae::ops
