// The functions of flash_attn_ext.h as ops in the namespace flash_attn_ext_cpp, for tests/test_cpp.py.

#include <flash_attn_ext/flash_attn_ext.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

flash_attn_ext::AttentionOptions options_of(bool causal, int64_t left, int64_t right, std::optional<double> scale,
                                            double softcap, Maybe bias, Maybe mask, Maybe slopes, Maybe sinks,
                                            double dropout_p, Maybe seqused_q, Maybe seqused_k) {
  flash_attn_ext::AttentionOptions options;
  options.causal = causal;
  options.window_size = {left, right};
  options.softmax_scale = scale;
  options.softcap = softcap;
  options.bias = std::move(bias);
  options.mask = std::move(mask);
  options.alibi_slopes = std::move(slopes);
  options.sinks = std::move(sinks);
  options.dropout_p = dropout_p;
  options.seqused_q = std::move(seqused_q);
  options.seqused_k = std::move(seqused_k);
  return options;
}

template <class... Options>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& cu_seqlens_q,
                                     const Maybe& cu_seqlens_k, Options... options) {
  const auto given = options_of(options...);
  const auto result = cu_seqlens_q ? flash_attn_ext::attention_varlen(q, k, v, *cu_seqlens_q, *cu_seqlens_k, given)
                                   : flash_attn_ext::attention(q, k, v, given);
  return {result.out, result.lse};
}

std::tuple<Tensor, Tensor> merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  const auto result = flash_attn_ext::merge(out_a, lse_a, out_b, lse_b);
  return {result.out, result.lse};
}

}  // namespace

TORCH_LIBRARY(flash_attn_ext_cpp, m) {
  m.def("attention", &attention<bool, int64_t, int64_t, std::optional<double>, double, Maybe, Maybe, Maybe, Maybe,
                                double, Maybe, Maybe>);
  m.def("merge", &merge);
  m.def("softmax", &flash_attn_ext::softmax);
}
