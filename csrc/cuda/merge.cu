#include "../core/schedule.h"
#include "group.h"
#include "launch.h"
#include "pack.h"
#include "rowwise.h"

// Joins attention over two sets of keys into attention over their union, and its gradient (core/rowwise.h).

namespace fae::cuda {
namespace {

constexpr int kRowThreads = 8;  // 128 contiguous bytes: what one head of 64 16-bit elements has
constexpr int kBlockThreads = 256;

using G = Group<kRowThreads>;

// One row of one head of every tensor: T in memory, its compute type in registers.
template <class T>
struct Row {
  int64_t batch, row, head;

  __device__ Row(const MergeArgs& args, int64_t index)
      : batch(index / args.heads / args.rows), row(index / args.heads % args.rows), head(index % args.heads) {}
  __device__ Compute<T>& operator[](const StatsView& view) const {
    return *stats_ptr<Compute<T>>(view, batch, row, head);
  }
  __device__ T* operator[](const TensorView& view) const { return row_ptr<T>(view, batch, row, head); }
};

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  using C = Compute<T>;
  const int64_t rows = args.batch * args.rows * args.heads;
  for (int64_t index = G::first_row(); index < rows; index += G::row_stride()) {
    const Row<T> row(args, index);
    const Merge<C> joined = fae::merge(row[args.lse_a], row[args.lse_b]);
    if (G::lane() == 0) row[args.lse] = joined.lse;
    C a[N], b[N];
    for (int64_t d = G::lane() * N; d < args.head_dim_v; d += kRowThreads * N) {
      load<N>(row[args.out_a] + d, a);
      load<N>(row[args.out_b] + d, b);
#pragma unroll
      for (int i = 0; i < N; ++i) a[i] = joined.weight_a * a[i] + joined.weight_b * b[i];
      store<N>(a, row[args.out] + d);
    }
  }
}

// The gradients of one side: what joined with weight exp(lse_side - lse).
template <class T, int N>
__device__ void side_backward(const MergeArgs& args, const Row<T>& row, const TensorView& out_side,
                              const StatsView& lse_side, const TensorView& dout_side, const StatsView& dlse_side) {
  using C = Compute<T>;
  const C weight = exp_of(row[lse_side] - finite_max(row[args.lse]));
  C total = 0, side[N], out[N], dout[N];
  for (int64_t d = G::lane() * N; d < args.head_dim_v; d += kRowThreads * N) {
    load<N>(row[out_side] + d, side);
    load<N>(row[args.out] + d, out);
    load<N>(row[args.dout] + d, dout);
    C sum = 0;  // of its own, so that rounding grows with the number of packs and not of elements
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum += dout[i] * (side[i] - out[i]);
      dout[i] *= weight;
    }
    total += sum;
    store<N>(dout, row[dout_side] + d);
  }
  total = G::all_join(total);
  if (G::lane() == 0) row[dlse_side] = weight * (row[args.dlse] + total);
}

template <class T, int N>
__global__ void __launch_bounds__(kBlockThreads) merge_backward_kernel(const __grid_constant__ MergeArgs args) {
  const int64_t rows = args.batch * args.rows * args.heads;
  for (int64_t index = G::first_row(); index < rows; index += G::row_stride()) {
    const Row<T> row(args, index);
    side_backward<T, N>(args, row, args.out_a, args.lse_a, args.dout_a, args.dlse_a);
    side_backward<T, N>(args, row, args.out_b, args.lse_b, args.dout_b, args.dlse_b);
  }
}

// Calls run(value of the storage type, pack size) with the latter as a constant.
template <class F>
void with_shape(const MergeArgs& args, F&& run) {
  with_type(args.dtype, [&](auto value) {
    using T = decltype(value);
    bool packs = args.head_dim_v % kPackSize<T> == 0;
    for (const TensorView& t : {args.out_a, args.out_b, args.out, args.dout, args.dout_a, args.dout_b})
      packs = packs && aligned(t.data, sizeof(T), t.stride_batch, t.stride_row, t.stride_head);
    if (packs)
      run(value, std::integral_constant<int, kPackSize<T>>{});
    else
      run(value, std::integral_constant<int, 1>{});
  });
}

Grid grid_of(const MergeArgs& args) {
  return {.blocks = ceil_div(args.batch * args.rows * args.heads, kBlockThreads / kRowThreads),
          .threads = kBlockThreads,
          .loops = true};
}

}  // namespace

void merge(const MergeArgs& args, const Execution& execution) {
  with_shape(args, [&](auto value, auto n) {
    launch("merge", merge_kernel<decltype(value), n()>, grid_of(args), execution.stream, args);
  });
}

void merge_backward(const MergeArgs& args, const Execution& execution) {
  with_shape(args, [&](auto value, auto n) {
    launch("merge_backward", merge_backward_kernel<decltype(value), n()>, grid_of(args), execution.stream, args);
  });
}

}  // namespace fae::cuda
