#pragma once

// flash_attn_ext for programs on LibTorch: exact attention without the matrix of scores, with gradients.
//
//   #include <flash_attn_ext/flash_attn_ext.h>
//   auto [out, lse] = flash_attn_ext::attention(q, k, v, {.causal = true});   // C++20; or fill in AttentionOptions
//
// Header-only, over the ops in libflash_attn_ext.so (and libflash_attn_ext_cuda.so), which the CMake package links:
// find_package(flash_attn_ext), target flash_attn_ext::flash_attn_ext. Shapes, dtypes and options are those of the
// Python functions with the same names; what a call cannot take is a c10::Error that lists every unmet constraint.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace flash_attn_ext {

using at::Tensor;

struct AttentionOptions {
  bool causal = false;                                 // row i sees keys j <= i + seqlen_k - seqlen_q
  std::pair<int64_t, int64_t> window_size{-1, -1};     // (left, right); -1: no limit
  std::optional<double> softmax_scale = std::nullopt;  // 1 / sqrt(head_dim)
  double softcap = 0;
  std::optional<Tensor> bias = std::nullopt;  // broadcasts to (batch, heads, seqlen_q, seqlen_k); has a gradient
  std::optional<Tensor> mask = std::nullopt;  // bool, broadcasts like bias; true: attend
  std::optional<Tensor> alibi_slopes = std::nullopt;  // float32 (heads) or (batch, heads); has no gradient
  std::optional<Tensor> sinks = std::nullopt;         // (heads); has a gradient
  double dropout_p = 0;                               // random numbers: the generator of q's device
  std::optional<Tensor> seqused_q = std::nullopt, seqused_k = std::nullopt;  // int32 (batch)
  bool deterministic = true;
};

struct AttentionResult {
  Tensor out;  // q's shape and dtype, with v's head dim
  Tensor lse;  // float32 (float64 for float64): (batch, heads, seqlen_q), packed (heads, total_q)
};

namespace detail {

using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<c10::SymInt>;

// What the ops take besides q, k and v, in the order of their schema.
struct Arguments {
  MaybeTensor bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, rng_state;
  MaybeInt window_left, window_right;
  double softmax_scale, softcap, dropout_p;
  bool allow_tf32, deterministic;
};

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::tuple<Tensor, Tensor> call_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& a) {
  static const auto forward =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                                    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                                    const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, MaybeInt, MaybeInt,
                                    MaybeInt, MaybeInt, double, double, double, bool)>("flash_attn_ext::forward");
  return forward.call(q, k, v, a.bias, a.mask, a.alibi_slopes, a.sinks, a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q,
                      a.seqused_k, a.rng_state, std::nullopt, std::nullopt, a.window_left, a.window_right,
                      a.softmax_scale, a.softcap, a.dropout_p, a.allow_tf32);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Gradients call_backward(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& out, const Tensor& lse, const Arguments& a,
                               bool bias_requires_grad) {
  static const auto backward =
      op<Gradients(const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                   const Tensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                   const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                   MaybeInt, MaybeInt, MaybeInt, MaybeInt, double, double, double, bool, bool, bool)>(
          "flash_attn_ext::backward");
  return backward.call(dout, dlse, q, k, v, out, lse, a.bias, a.mask, a.alibi_slopes, a.sinks, a.cu_seqlens_q,
                       a.cu_seqlens_k, a.seqused_q, a.seqused_k, a.rng_state, std::nullopt, std::nullopt, a.window_left,
                       a.window_right, a.softmax_scale, a.softcap, a.dropout_p, a.allow_tf32, a.deterministic,
                       bias_requires_grad);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Passes the gradients on. A gradient of them would come out as zero without a word, as the op backward is not
// differentiated here: this node, which has all that they depend on as its inputs, is in its way.
struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext*, at::TensorList, const variable_list& gradients) { return gradients; }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false, "flash_attn_ext: the C++ API has no gradient of the gradient; the Python package has");
  }
};

inline variable_list first_derivatives(std::initializer_list<MaybeTensor> depend_on, const variable_list& gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  variable_list inputs;
  for (const MaybeTensor& x : depend_on)
    if (x) inputs.push_back(*x);
  return NoSecondDerivative::apply(at::TensorList(inputs), gradients);
}

struct Attention : torch::autograd::Function<Attention> {
  // The differentiable ones are parameters of their own, in the order of backward's result.
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const MaybeTensor& bias, const MaybeTensor& sinks, Arguments a) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    a.bias = bias;
    a.sinks = sinks;
    auto [out, lse] = call_forward(q, k, v, a);
    variable_list saved{out, lse, q, k, v};
    for (const MaybeTensor& x : {a.bias, a.mask, a.alibi_slopes, a.sinks, a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q,
                                 a.seqused_k, a.rng_state})
      saved.push_back(x.value_or(Tensor()));
    ctx->save_for_backward(std::move(saved));
    const auto integer = [](const MaybeInt& x) { return x ? c10::IValue(x->expect_int()) : c10::IValue(); };
    ctx->saved_data["window_left"] = integer(a.window_left);
    ctx->saved_data["window_right"] = integer(a.window_right);
    ctx->saved_data["numbers"] = std::vector<double>{a.softmax_scale, a.softcap, a.dropout_p};
    ctx->saved_data["flags"] = std::vector<bool>{a.allow_tf32, a.deterministic};
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    const variable_list saved = ctx->get_saved_variables();
    const auto at = [&](size_t i) { return saved[i].defined() ? MaybeTensor(saved[i]) : std::nullopt; };
    const auto integer = [&](const char* name) {
      const c10::IValue& x = ctx->saved_data[name];
      return x.isNone() ? MaybeInt() : MaybeInt(x.toInt());
    };
    const std::vector<double> numbers = ctx->saved_data["numbers"].toDoubleVector();
    const c10::List<bool> flags = ctx->saved_data["flags"].toBoolList();
    const Tensor &out = saved[0], &lse = saved[1], &q = saved[2], &k = saved[3], &v = saved[4];
    const Arguments a{at(5),
                      at(6),
                      at(7),
                      at(8),
                      at(9),
                      at(10),
                      at(11),
                      at(12),
                      at(13),
                      integer("window_left"),
                      integer("window_right"),
                      numbers[0],
                      numbers[1],
                      numbers[2],
                      flags[0],
                      flags[1]};
    // needs_input_grad counts the tensors that were given.
    const bool bias_requires_grad = a.bias && ctx->needs_input_grad(3);
    const bool sinks_require_grad = a.sinks && ctx->needs_input_grad(a.bias ? 4 : 3);
    const Tensor dout = incoming[0].defined() ? incoming[0] : at::zeros_like(out);
    const MaybeTensor dlse = incoming[1].defined() ? MaybeTensor(incoming[1]) : std::nullopt;

    variable_list gradients;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [dq, dk, dv, dbias, dsinks] = call_backward(dout, dlse, q, k, v, out, lse, a, bias_requires_grad);
      gradients = {dq, dk, dv};
      if (bias_requires_grad) gradients.push_back(dbias);
      if (sinks_require_grad) gradients.push_back(dsinks);
    }
    gradients = first_derivatives({dout, dlse, q, k, v, a.bias, a.sinks}, gradients);
    variable_list result{gradients[0], gradients[1], gradients[2], Tensor(), Tensor(), Tensor()};
    if (bias_requires_grad) result[3] = gradients[3];
    if (sinks_require_grad) result[4] = gradients.back();
    return result;
  }
};

// Under autocast q, k and v take its dtype; float64 stays, and so does a float32 bias.
inline Tensor autocast(const Tensor& x, at::DeviceType device) {
  const bool casts = (device == at::kCPU || device == at::kCUDA) && at::autocast::is_autocast_enabled(device) &&
                     x.is_floating_point() && x.scalar_type() != at::kDouble;
  return casts ? x.to(at::autocast::get_autocast_dtype(device)) : x;
}

inline AttentionResult attend(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& cu_seqlens_q,
                              const MaybeTensor& cu_seqlens_k, const AttentionOptions& options) {
  const auto [left, right] = options.window_size;
  std::string unmet;
  if (left < -1 || right < -1)
    unmet += c10::str("\n- window_size must be two integers (left, right), each -1 (no limit) or at least 0, got (",
                      left, ", ", right, ")");
  if (at::GradMode::is_enabled() && options.alibi_slopes && options.alibi_slopes->requires_grad())
    unmet +=
        "\n- alibi_slopes has no gradient, and must not require one: pass alibi_slopes.detach(); slopes that learn can "
        "be added to the scores through bias, which has one";
  TORCH_CHECK_VALUE(unmet.empty(), "flash_attn_ext: constraints are not met", unmet);
  const auto limit = [](int64_t side) { return side == -1 ? MaybeInt() : MaybeInt(side); };
  const auto four_dimensional = [](MaybeTensor x) {
    while (x && x->dim() < 4) x = x->unsqueeze(0);
    return x;
  };
  Arguments a{};
  a.mask = four_dimensional(options.mask);
  a.alibi_slopes = options.alibi_slopes;
  a.cu_seqlens_q = cu_seqlens_q;
  a.cu_seqlens_k = cu_seqlens_k;
  a.seqused_q = options.seqused_q;
  a.seqused_k = options.seqused_k;
  if (options.dropout_p > 0)
    a.rng_state = at::randint(std::numeric_limits<int64_t>::max(), {2}, q.options().dtype(at::kLong));
  a.window_left = limit(left);
  a.window_right = options.causal ? MaybeInt(0) : limit(right);
  const int64_t head_dim = q.dim() ? std::max<int64_t>(q.size(-1), 1) : 1;
  a.softmax_scale = options.softmax_scale.value_or(std::pow(static_cast<double>(head_dim), -0.5));
  a.softcap = options.softcap;
  a.dropout_p = options.dropout_p;
  a.allow_tf32 = q.is_cuda() && at::globalContext().allowTF32CuBLAS();
  a.deterministic = options.deterministic;
  MaybeTensor sinks = options.sinks;
  if (sinks) sinks = sinks->to(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  MaybeTensor bias = four_dimensional(options.bias);
  const at::DeviceType device = q.device().type();
  if (bias && bias->scalar_type() != at::kFloat) bias = autocast(*bias, device);
  const variable_list result =
      Attention::apply(autocast(q, device), autocast(k, device), autocast(v, device), bias, sinks, a);
  return {result[0], result[1]};
}

struct Merge : torch::autograd::Function<Merge> {
  static variable_list forward(AutogradContext* ctx, const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                               const Tensor& lse_b) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto merge =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "flash_attn_ext::merge");
    auto [out, lse] = merge.call(out_a, lse_a, out_b, lse_b);
    ctx->save_for_backward({out_a, lse_a, out_b, lse_b, out, lse});
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    static const auto merge_backward =
        op<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
            "flash_attn_ext::merge_backward");
    const variable_list x = ctx->get_saved_variables();
    variable_list gradients;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [dout_a, dlse_a, dout_b, dlse_b] =
          merge_backward.call(incoming[0], incoming[1], x[0], x[1], x[2], x[3], x[4], x[5]);
      gradients = {dout_a, dlse_a, dout_b, dlse_b};
    }
    return first_derivatives({incoming[0], incoming[1], x[0], x[1], x[2], x[3]}, gradients);
  }
};

struct Softmax : torch::autograd::Function<Softmax> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto softmax = op<Tensor(const Tensor&)>("flash_attn_ext::softmax");
    const Tensor y = softmax.call(x);
    ctx->save_for_backward({y});
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    static const auto softmax_backward = op<Tensor(const Tensor&, const Tensor&)>("flash_attn_ext::softmax_backward");
    const Tensor y = ctx->get_saved_variables()[0];
    Tensor dx;
    {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      dx = softmax_backward.call(incoming[0], y);
    }
    return first_derivatives({incoming[0], y}, {dx});
  }
};

}  // namespace detail

// q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (batch, seqlen_k, heads_kv,
// head_dim_v).
inline AttentionResult attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const AttentionOptions& options = {}) {
  return detail::attend(q, k, v, std::nullopt, std::nullopt, options);
}

// Packed sequences: q (total_q, heads, head_dim), k and v (total_k, ...), cu_seqlens int32 (batch + 1).
inline AttentionResult attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                        const Tensor& cu_seqlens_k, const AttentionOptions& options = {}) {
  return detail::attend(q, k, v, cu_seqlens_q, cu_seqlens_k, options);
}

// Joins the attention of the same queries over two sets of keys into that over both: out_a, out_b (batch, seqlen_q,
// heads, head_dim) or packed (total_q, heads, head_dim), lse_a, lse_b (batch, heads, seqlen_q) or (heads, total_q).
inline AttentionResult merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  const auto result = detail::Merge::apply(out_a, lse_a, out_b, lse_b);
  return {result[0], result[1]};
}

// Softmax of x (..., n) over the last dimension, its maximum and sum found in one pass.
inline Tensor softmax(const Tensor& x) { return detail::Softmax::apply(x)[0]; }

}  // namespace flash_attn_ext
