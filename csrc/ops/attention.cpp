#include <algorithm>
#include <limits>

#include "checks.h"
#include "dispatch.h"
#include "execution.h"
#include "ops.h"

namespace fae::ops {
namespace {

// The views stay good as long as `in` does, which keeps the copies of tensors whose rows are not as they should be.
Problem problem_of(Inputs& in, const Extents& e, bool whole_vectors) {
  for (Tensor* t : {&in.q, &in.k, &in.v}) {
    *t = with_contiguous_rows(*t);
    if (whole_vectors) *t = with_whole_vectors(*t);
  }
  for (MaybeTensor* t :
       {&in.alibi_slopes, &in.sinks, &in.cu_seqlens_q, &in.cu_seqlens_k, &in.seqused_q, &in.seqused_k, &in.rng_state})
    *t = with_contiguous_rows(*t);

  Problem p;
  p.dtype = *dtype_of(in.q);
  p.batch = e.batch;
  p.heads = e.heads;
  p.heads_kv = e.heads_kv;
  p.head_dim = in.q.size(in.q.dim() - 1);
  p.head_dim_v = in.v.size(in.v.dim() - 1);
  p.max_seqlen_q = e.max_seqlen_q;
  p.max_seqlen_k = e.max_seqlen_k;
  if (e.packed) {
    p.total_q = e.rows_q;
    p.total_k = e.rows_k;
  }
  p.q = tensor_view(in.q);
  p.k = tensor_view(in.k);
  p.v = tensor_view(in.v);
  p.cu_seqlens_q = static_cast<const int32_t*>(data(in.cu_seqlens_q));
  p.cu_seqlens_k = static_cast<const int32_t*>(data(in.cu_seqlens_k));
  p.seqused_q = static_cast<const int32_t*>(data(in.seqused_q));
  p.seqused_k = static_cast<const int32_t*>(data(in.seqused_k));
  p.window_left = std::clamp(in.window_left.value_or(kUnlimited), -kUnlimited, kUnlimited);
  p.window_right = std::clamp(in.window_right.value_or(kUnlimited), -kUnlimited, kUnlimited);
  p.softmax_scale = in.softmax_scale;
  p.softcap = in.softcap;
  p.alibi_slopes = static_cast<const float*>(data(in.alibi_slopes));
  if (in.alibi_slopes && in.alibi_slopes->dim() == 2) p.alibi_stride_batch = in.alibi_slopes->stride(0);
  p.bias = score_view(in.bias);
  p.mask = score_view(in.mask);
  p.sinks = data(in.sinks);
  p.dropout_p = in.dropout_p;
  p.allow_tf32 = in.allow_tf32;
  p.rng_state = static_cast<const int64_t*>(data(in.rng_state));
  return p;
}

// Whether rows can exist that no sequence has: unused ones, padding of packed tensors.
bool has_other_rows_q(const Inputs& in) { return in.cu_seqlens_q || in.seqused_q; }
bool has_other_rows_k(const Inputs& in) { return in.cu_seqlens_k || in.seqused_k; }

}  // namespace

std::tuple<int64_t, int64_t, int64_t> check(Inputs in) {
  const Extents extents = check_forward(in);
  return {extents.batch, extents.max_seqlen_q, extents.max_seqlen_k};
}

std::tuple<Tensor, Tensor> forward(Inputs in) {
  const Extents extents = check_forward(in);
  Tensor out = new_empty(in.q, extents.out_sizes(), in.q.scalar_type());
  Tensor lse = new_empty(in.q, extents.lse_sizes(), stats_type(in.q));
  if (out.numel() == 0) return {out, lse};

  const bool whole_vectors = takes_whole_vectors(in.q.is_cuda());
  Problem p = problem_of(in, extents, whole_vectors);
  Tensor result = whole_vectors ? for_whole_vectors(out) : out;
  p.out = tensor_view(result);
  p.lse = stats_view(lse);
  Runner runner(in.q);
  const Backend& backend = choose_backend(p, in.q.is_cuda());
  if (has_other_rows_q(in) && !backend.writes_all_rows) {
    torch::stable::zero_(result);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  backend.forward(p, runner.execution(backend.forward_workspace(p, runner.threads())));
  take_columns(out, result);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Inputs in, Gradients g) {
  const Extents extents = check_backward(in, g);
  Tensor dq = new_empty_like(in.q), dk = new_empty_like(in.k), dv = new_empty_like(in.v);
  Tensor dbias = g.bias_requires_grad ? new_empty_like(*in.bias) : new_empty(in.q, {0}, in.q.scalar_type());
  Tensor dsinks = in.sinks ? new_empty_like(*in.sinks) : new_empty(in.q, {0}, stats_type(in.q));
  const bool empty = g.out.numel() == 0;
  torch::stable::zero_(dsinks);
  const auto clear_keys = [&] {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  };
  if (empty) {
    torch::stable::zero_(dq);
    clear_keys();
    torch::stable::zero_(dbias);
    return {dq, dk, dv, dbias, dsinks};
  }

  const bool whole_vectors = takes_whole_vectors(in.q.is_cuda());
  BackwardProblem p;
  static_cast<Problem&>(p) = problem_of(in, extents, whole_vectors);
  for (Tensor* t : {&g.dout, &g.out}) {
    *t = with_contiguous_rows(*t);
    if (whole_vectors) *t = with_whole_vectors(*t);
  }
  p.out = tensor_view(g.out);
  p.lse = stats_view(g.lse);
  p.dout = tensor_view(g.dout);
  if (g.dlse) p.dlse = stats_view(*g.dlse);
  const auto result_for = [&](const Tensor& t) { return whole_vectors ? for_whole_vectors(t) : t; };
  const Tensor dq_result = result_for(dq), dk_result = result_for(dk), dv_result = result_for(dv);
  p.dq = tensor_view(dq_result);
  p.dk = tensor_view(dk_result);
  p.dv = tensor_view(dv_result);
  if (g.bias_requires_grad) p.dbias = score_view(dbias);
  if (in.sinks) p.dsinks = dsinks.data_ptr();
  p.deterministic = g.deterministic;
  Runner runner(in.q);
  const Backend& backend = choose_backend(p, in.q.is_cuda());
  // Backends may leave out what is hidden. Without keys, a bias that is the same for all of them still has elements.
  if (p.hides_scores() || p.max_seqlen_k == 0) torch::stable::zero_(dbias);
  if (has_other_rows_q(in) && !backend.writes_all_rows) torch::stable::zero_(dq);
  if (has_other_rows_k(in) && !backend.writes_all_rows) clear_keys();
  backend.backward(p, runner.execution(backend.backward_workspace(p, runner.threads())));
  take_columns(dq, dq_result);
  take_columns(dk, dk_result);
  take_columns(dv, dv_result);
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace fae::ops
