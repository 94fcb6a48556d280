#include "../core/schedule.h"
#include "../core/softmax.h"
#include "kernels.h"
#include "pack.h"

// Joins attention over two sets of keys into attention over their union, and its gradient (core/rowwise.h).

namespace fae::cpu::FAE_LEVEL {
namespace {

constexpr int64_t kTaskElements = 8192;  // a task is about this many elements, or one row
constexpr int kChains = 4;               // sums side by side: they overlap, and each rounds a quarter as often

// One row of one head of every tensor: S in memory, T in registers.
template <class T, class S>
struct Row {
  int64_t batch, row, head;

  T& operator[](const StatsView& view) const { return *stats_ptr<T>(view, batch, row, head); }
  S* operator[](const TensorView& view) const { return row_ptr<S>(view, batch, row, head); }
};

template <class T, class S>
void merge_row(const MergeArgs& args, const Row<T, S>& row) {
  const Merge<T> joined = fae::merge(row[args.lse_a], row[args.lse_b]);
  row[args.lse] = joined.lse;
  const S *a = row[args.out_a], *b = row[args.out_b];
  S* out = row[args.out];
  for (int64_t d = 0; d < args.head_dim_v; d += Vec<T>::width) {
    const int64_t left = args.head_dim_v - d;
    store_as(joined.weight_a * load_as<T>(a + d, left) + joined.weight_b * load_as<T>(b + d, left), out + d, left);
  }
}

// The gradients of one side: what joined with weight exp(lse_side - lse).
template <class T, class S>
void side_backward_row(const MergeArgs& args, const Row<T, S>& row, const TensorView& out_side,
                       const StatsView& lse_side, const TensorView& dout_side, const StatsView& dlse_side) {
  const S *out = row[args.out], *side = row[out_side], *dout = row[args.dout];
  S* result = row[dout_side];
  const T weight = fae::exp_of(row[lse_side] - finite_max(row[args.lse]));
  Vec<T> products[kChains] = {};
  for (int64_t d = 0; d < args.head_dim_v; d += kChains * Vec<T>::width) {
    for (int i = 0; i < kChains; ++i) {
      const int64_t at = d + i * Vec<T>::width, left = args.head_dim_v - at;
      const Vec<T> gradient = load_as<T>(dout + at, left);
      products[i] += gradient * (load_as<T>(side + at, left) - load_as<T>(out + at, left));
      store_as(weight * gradient, result + at, left);
    }
  }
  row[dlse_side] = weight * (row[args.dlse] + sum((products[0] + products[1]) + (products[2] + products[3])));
}

// Calls f(Row) for every row of every head.
template <class F>
void for_each_row(const MergeArgs& args, const Execution& execution, F&& f) {
  const int64_t rows = args.batch * args.rows * args.heads;
  const int64_t rows_per_task = kTaskElements / (args.head_dim_v + 1) + 1;
  const auto run = [&](auto compute) {
    with_storage<decltype(compute)>(args.dtype, [&](auto storage) {
      execution.parallel(ceil_div(rows, rows_per_task), [&](int64_t task, int) {
        const int64_t begin = task * rows_per_task, end = begin + rows_per_task;
        for (int64_t i = begin; i < (end < rows ? end : rows); ++i)
          f(Row<decltype(compute), decltype(storage)>{i / args.heads / args.rows, i / args.heads % args.rows,
                                                      i % args.heads});
      });
    });
  };
  args.dtype == DType::float64 ? run(double{}) : run(float{});
}

}  // namespace

void merge(const MergeArgs& args, const Execution& execution) {
  for_each_row(args, execution, [&](const auto& row) { merge_row(args, row); });
}

void merge_backward(const MergeArgs& args, const Execution& execution) {
  for_each_row(args, execution, [&](const auto& row) {
    side_backward_row(args, row, args.out_a, args.lse_a, args.dout_a, args.dlse_a);
    side_backward_row(args, row, args.out_b, args.lse_b, args.dout_b, args.dlse_b);
  });
}

}  // namespace fae::cpu::FAE_LEVEL
