#include "checks.h"
#include "dispatch.h"
#include "execution.h"
#include "ops.h"

namespace fae::ops {
namespace {

// Rows along the last dimension, everything contiguous.
SoftmaxArgs softmax_args(const Tensor& result) {
  SoftmaxArgs args;
  args.dtype = *dtype_of(result);
  args.result = result.data_ptr();
  args.cols = result.dim() == 0 ? 1 : result.size(result.dim() - 1);
  args.rows = args.cols == 0 ? 0 : result.numel() / args.cols;
  return args;
}

// Everything that forward and backward share; the tensors have contiguous rows.
MergeArgs merge_args(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b,
                     const Tensor& out, const Tensor& lse) {
  const int64_t d = out_a.dim();
  MergeArgs args;
  args.dtype = *dtype_of(out_a);
  args.batch = d == 4 ? out_a.size(0) : 1;
  args.rows = out_a.size(d - 3);
  args.heads = out_a.size(d - 2);
  args.head_dim_v = out_a.size(d - 1);
  args.out_a = tensor_view(out_a);
  args.out_b = tensor_view(out_b);
  args.out = tensor_view(out);
  args.lse_a = stats_view(lse_a);
  args.lse_b = stats_view(lse_b);
  args.lse = stats_view(lse);
  return args;
}

}  // namespace

Tensor softmax(Tensor x) {
  check_softmax(x);
  x = torch::stable::contiguous(x);
  Tensor y = new_empty_like(x);
  SoftmaxArgs args = softmax_args(y);
  args.x = x.data_ptr();
  Runner runner(x);
  if (args.rows > 0) rowwise_kernels(x.is_cuda()).softmax(args, runner.execution());
  return y;
}

Tensor softmax_backward(Tensor dy, Tensor y) {
  check_softmax_backward(dy, y);
  dy = torch::stable::contiguous(dy);
  y = torch::stable::contiguous(y);
  Tensor dx = new_empty_like(y);
  SoftmaxArgs args = softmax_args(dx);
  args.x = dy.data_ptr();
  args.y = y.data_ptr();
  Runner runner(y);
  if (args.rows > 0) rowwise_kernels(y.is_cuda()).softmax_backward(args, runner.execution());
  return dx;
}

std::tuple<Tensor, Tensor> merge(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  check_merge(out_a, lse_a, out_b, lse_b);
  for (Tensor* t : {&out_a, &out_b}) *t = with_contiguous_rows(*t);
  Tensor out = new_empty_like(out_a), lse = new_empty_like(lse_a);
  const MergeArgs args = merge_args(out_a, lse_a, out_b, lse_b, out, lse);
  Runner runner(out_a);
  if (lse.numel() > 0) rowwise_kernels(out_a.is_cuda()).merge(args, runner.execution());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a,
                                                          Tensor out_b, Tensor lse_b, Tensor out, Tensor lse) {
  check_merge_backward(dout, dlse, out_a, lse_a, out_b, lse_b, out, lse);
  for (Tensor* t : {&dout, &out_a, &out_b, &out}) *t = with_contiguous_rows(*t);
  Tensor dout_a = new_empty_like(out_a), dout_b = new_empty_like(out_b);
  Tensor dlse_a = new_empty_like(lse_a), dlse_b = new_empty_like(lse_b);
  MergeArgs args = merge_args(out_a, lse_a, out_b, lse_b, out, lse);
  args.dout = tensor_view(dout);
  args.dlse = stats_view(dlse);
  args.dout_a = tensor_view(dout_a);
  args.dout_b = tensor_view(dout_b);
  args.dlse_a = stats_view(dlse_a);
  args.dlse_b = stats_view(dlse_b);
  Runner runner(out_a);
  if (lse.numel() > 0) rowwise_kernels(out_a.is_cuda()).merge_backward(args, runner.execution());
  return {dout_a, dlse_a, dout_b, dlse_b};
}

}  // namespace fae::ops
