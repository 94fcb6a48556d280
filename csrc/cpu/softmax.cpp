#include "../core/softmax.h"

#include "../core/schedule.h"
#include "kernels.h"
#include "pack.h"

// Softmax over rows with two reads of the input instead of three: one for the running maximum and sum (arXiv
// 1805.02867, algorithm 3, a few vectors at a time), one that normalises. A row without any finite value or with NaN
// gives NaN.

namespace fae::cpu::FAE_LEVEL {
namespace {

constexpr int kBlock = 8;                // vectors per update of the maximum
constexpr int kChains = 4;               // sums side by side: they overlap, and each rounds a quarter as often
constexpr int64_t kTaskElements = 8192;  // a task is this many elements or one row

template <class T, class S>
RowState<T> statistics(const S* x, int64_t cols) {
  constexpr int W = Vec<T>::width;
  const Vec<T> unseen = minus_infinity<T>();
  RowState<T, Vec<T>> state;
  for (int64_t j = 0; j < cols; j += kBlock * W) {
    Vec<T> values[kBlock], largest = unseen;
    for (int i = 0; i < kBlock; ++i) {
      const int64_t left = cols - j - i * W;
      values[i] = left >= W ? load_as<T>(x + j + i * W)
                  : left > 0
                      ? select<T>(Vec<T>::iota(0).v < static_cast<T>(left), load_as<T>(x + j + i * W, left), unseen)
                      : unseen;
      largest = max(largest, values[i]);
    }
    state.update_max(max(largest));
    const T m = finite_max(state.m);
    Vec<T> sum = T(0);  // of its own, so that rounding grows with the number of blocks and not of elements
    for (int i = 0; i < kBlock; ++i) sum += exp_of(values[i] - m);
    state.l += sum;
  }
  return state.total();
}

template <class T, class S>
void softmax_row(const S* x, int64_t cols, S* y) {
  const RowState<T> state = statistics<T>(x, cols);
  const T factor = T(1) / state.l;
  for (int64_t j = 0; j < cols; j += Vec<T>::width)
    store_as(exp_of(load_as<T>(x + j, cols - j) - state.m) * factor, y + j, cols - j);
}

// dx = y * (dy - sum(dy * y))
template <class T, class S>
void softmax_backward_row(const S* dy, const S* y, int64_t cols, S* dx) {
  constexpr int W = Vec<T>::width;
  Vec<T> products[kChains] = {};
  for (int64_t j = 0; j < cols; j += kChains * W)
    for (int i = 0; i < kChains; ++i) {
      const int64_t at = j + i * W;
      products[i] += load_as<T>(dy + at, cols - at) * load_as<T>(y + at, cols - at);
    }
  const T total = sum((products[0] + products[1]) + (products[2] + products[3]));
  for (int64_t j = 0; j < cols; j += W)
    store_as(load_as<T>(y + j, cols - j) * (load_as<T>(dy + j, cols - j) - total), dx + j, cols - j);
}

// Calls row(offset, compute type, storage type) for the first element of every row.
template <class F>
void for_each_row(const SoftmaxArgs& args, const Execution& execution, F&& row) {
  const int64_t rows_per_task = args.cols < kTaskElements ? kTaskElements / args.cols : 1;
  const auto run = [&](auto compute) {
    with_storage<decltype(compute)>(args.dtype, [&](auto storage) {
      execution.parallel(ceil_div(args.rows, rows_per_task), [&](int64_t task, int) {
        const int64_t begin = task * rows_per_task, end = begin + rows_per_task;
        for (int64_t i = begin; i < (end < args.rows ? end : args.rows); ++i) row(i * args.cols, compute, storage);
      });
    });
  };
  args.dtype == DType::float64 ? run(double{}) : run(float{});
}

}  // namespace

void softmax(const SoftmaxArgs& args, const Execution& execution) {
  for_each_row(args, execution, [&](int64_t offset, auto compute, auto storage) {
    using S = decltype(storage);
    softmax_row<decltype(compute)>(static_cast<const S*>(args.x) + offset, args.cols,
                                   static_cast<S*>(args.result) + offset);
  });
}

void softmax_backward(const SoftmaxArgs& args, const Execution& execution) {
  for_each_row(args, execution, [&](int64_t offset, auto compute, auto storage) {
    using S = decltype(storage);
    softmax_backward_row<decltype(compute)>(static_cast<const S*>(args.x) + offset,
                                            static_cast<const S*>(args.y) + offset, args.cols,
                                            static_cast<S*>(args.result) + offset);
  });
}

}  // namespace fae::cpu::FAE_LEVEL
