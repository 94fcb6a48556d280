#include "ops.h"

namespace fae::ops {
namespace {

// Dense: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) -> out (B, Sq, H, Dv), lse (B, H, Sq).
// Packed, where cu_seqlens_q and cu_seqlens_k (int32, B + 1) are given: q (total_q, H, D), k (total_k, Hk, D),
// v (total_k, Hk, Dv) -> out (total_q, H, Dv), lse (H, total_q).
// bias (q's dtype or float32) and mask (bool, true = attend): 4-D, each dimension 1 or that of (B, H, Sq, Sk).
// alibi_slopes: float32 (H) or (B, H). sinks: (H). seqused_q, seqused_k: int32 (B). rng_state: int64 (seed, offset).
// lse and sinks: float32, float64 with float64 inputs. window_left, window_right: None = no limit.
// allow_tf32: float32 products on CUDA may round their factors to tf32.
// dbias and dsinks have shape (0) where they are not wanted.
#define FAE_OPTIONS                                                                                       \
  "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "                                     \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? rng_state, " \
  "SymInt? max_seqlen_q, SymInt? max_seqlen_k, SymInt? window_left, SymInt? window_right, "               \
  "float softmax_scale, float softcap, float dropout_p, bool allow_tf32"

STABLE_TORCH_LIBRARY(flash_attn_ext, m) {
  m.def("check(Tensor q, Tensor k, Tensor v, " FAE_OPTIONS ") -> (int batch, int max_seqlen_q, int max_seqlen_k)");
  m.def("forward(Tensor q, Tensor k, Tensor v, " FAE_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def("backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " FAE_OPTIONS
        ", bool deterministic, bool bias_requires_grad) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)");
  m.def("softmax(Tensor x) -> Tensor");
  m.def("softmax_backward(Tensor dy, Tensor y) -> Tensor");
  m.def("merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor out, "
      "Tensor lse) -> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)");
}
#undef FAE_OPTIONS

// Takes arguments off the dispatcher's stack, in the order of the schema, into the fields of a struct; TORCH_BOX would
// want every one of them in the parameter list of every function on the way.
struct ArgumentStack {
  StableIValue* next;

  template <class T>
  ArgumentStack& operator>>(T& argument) {
    argument = torch::stable::detail::to<T>(*next++);
    return *this;
  }
};

ArgumentStack& take_options(ArgumentStack& stack, Inputs& in) {
  return stack >> in.bias >> in.mask >> in.alibi_slopes >> in.sinks >> in.cu_seqlens_q >> in.cu_seqlens_k >>
         in.seqused_q >> in.seqused_k >> in.rng_state >> in.max_seqlen_q >> in.max_seqlen_k >> in.window_left >>
         in.window_right >> in.softmax_scale >> in.softcap >> in.dropout_p >> in.allow_tf32;
}

Inputs take_inputs(StableIValue* stack) {
  ArgumentStack arguments{stack};
  Inputs in;
  arguments >> in.q >> in.k >> in.v;
  take_options(arguments, in);
  return in;
}

void boxed_check(StableIValue* stack, uint64_t, uint64_t) {
  torch::stable::detail::box_from_tuple(stack, check(take_inputs(stack)));
}

void boxed_forward(StableIValue* stack, uint64_t, uint64_t) {
  torch::stable::detail::box_from_tuple(stack, forward(take_inputs(stack)));
}

void boxed_backward(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentStack arguments{stack};
  Inputs in;
  Gradients g;
  arguments >> g.dout >> g.dlse >> in.q >> in.k >> in.v >> g.out >> g.lse;
  take_options(arguments, in) >> g.deterministic >> g.bias_requires_grad;
  torch::stable::detail::box_from_tuple(stack, backward(std::move(in), std::move(g)));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CPU, m) { register_ops(m); }
// On every device, and for meta tensors: it looks at facts only.
STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CompositeExplicitAutograd, m) { m.impl("check", boxed_check); }

}  // namespace

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("forward", boxed_forward);
  library.impl("backward", boxed_backward);
  library.impl("softmax", TORCH_BOX(&softmax));
  library.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("merge_backward", TORCH_BOX(&merge_backward));
}

}  // namespace fae::ops
