#include "../core/schedule.h"
#include "group.h"
#include "launch.h"
#include "pack.h"
#include "rowwise.h"

// Softmax over rows with two reads of the input instead of three: one for the running maximum and sum (arXiv
// 1805.02867, algorithm 3), one, from cache, that normalises. A row without any finite value or with NaN gives NaN.

namespace fae::cuda {
namespace {

constexpr int kBlockThreads = 512;
constexpr int64_t kWarpRow = 1024;  // rows up to this many elements get a warp each, longer ones a block

template <class T, int N, int kThreads>
__global__ void __launch_bounds__(kBlockThreads)
    softmax_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t cols) {
  using G = Group<kThreads>;
  using C = Compute<T>;
  for (int64_t row = G::first_row(); row < rows; row += G::row_stride()) {
    const T* const x_row = x + row * cols;
    T* const y_row = y + row * cols;
    RowState<C> state;
    C values[N];
#pragma unroll 2  // two packs in flight; the four of the compiler's choice spill registers
    for (int64_t j = G::lane() * N; j < cols; j += kThreads * N) {
      load<N>(x_row + j, values);
      C largest = values[0];
#pragma unroll
      for (int i = 1; i < N; ++i) largest = values[i] > largest ? values[i] : largest;
      state.update_max(largest);
      const C m = finite_max(state.m);
      C sum = 0;  // of its own, so that rounding grows with the number of packs and not of elements
#pragma unroll
      for (int i = 0; i < N; ++i) sum += exp_of(values[i] - m);
      state.l += sum;
    }
    state = G::all_join(state);
    const C factor = C(1) / state.l;  // one more rounding than a division, which float64 takes instead
#pragma unroll 2                      // two packs in flight; the four of the compiler's choice spill registers
    for (int64_t j = G::lane() * N; j < cols; j += kThreads * N) {
      load<N>(x_row + j, values);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const C e = exp_of(values[i] - state.m);
        values[i] = std::is_same_v<C, double> ? e / state.l : e * factor;
      }
      store<N>(values, y_row + j);
    }
  }
}

// dx = y * (dy - sum(dy * y))
template <class T, int N, int kThreads>
__global__ void __launch_bounds__(kBlockThreads)
    softmax_backward_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, int64_t rows,
                            int64_t cols) {
  using G = Group<kThreads>;
  using C = Compute<T>;
  for (int64_t row = G::first_row(); row < rows; row += G::row_stride()) {
    const int64_t begin = row * cols;
    C total = 0, dy_values[N], y_values[N];
#pragma unroll 2  // two packs in flight; the four of the compiler's choice spill registers
    for (int64_t j = G::lane() * N; j < cols; j += kThreads * N) {
      load<N>(dy + begin + j, dy_values);
      load<N>(y + begin + j, y_values);
      C sum = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) sum += dy_values[i] * y_values[i];
      total += sum;
    }
    total = G::all_join(total);
#pragma unroll 2  // two packs in flight; the four of the compiler's choice spill registers
    for (int64_t j = G::lane() * N; j < cols; j += kThreads * N) {
      load<N>(dy + begin + j, dy_values);
      load<N>(y + begin + j, y_values);
#pragma unroll
      for (int i = 0; i < N; ++i) y_values[i] *= dy_values[i] - total;
      store<N>(y_values, dx + begin + j);
    }
  }
}

// Calls run(value of the storage type, pack size, threads per row) with the last two as constants.
template <class F>
void with_shape(const SoftmaxArgs& args, F&& run) {
  with_type(args.dtype, [&](auto value) {
    using T = decltype(value);
    const auto with_threads = [&](auto n) {
      if (args.cols <= kWarpRow)
        run(value, n, std::integral_constant<int, 32>{});
      else
        run(value, n, std::integral_constant<int, kBlockThreads>{});
    };
    const bool packs = aligned(args.x, sizeof(T), args.cols) && aligned(args.result, sizeof(T)) &&
                       aligned(args.y, sizeof(T));  // y is null in the forward pass
    if (packs)
      with_threads(std::integral_constant<int, kPackSize<T>>{});
    else
      with_threads(std::integral_constant<int, 1>{});
  });
}

int threads_of(int row_threads) { return row_threads == 32 ? 128 : row_threads; }
Grid grid_of(int64_t rows, int row_threads) {
  return {.blocks = ceil_div(rows, threads_of(row_threads) / row_threads),
          .threads = threads_of(row_threads),
          .loops = true};
}

}  // namespace

void softmax(const SoftmaxArgs& args, const Execution& execution) {
  with_shape(args, [&](auto value, auto n, auto row_threads) {
    using T = decltype(value);
    launch("softmax", softmax_kernel<T, n(), row_threads()>, grid_of(args.rows, row_threads), execution.stream,
           static_cast<const T*>(args.x), static_cast<T*>(args.result), args.rows, args.cols);
  });
}

void softmax_backward(const SoftmaxArgs& args, const Execution& execution) {
  with_shape(args, [&](auto value, auto n, auto row_threads) {
    using T = decltype(value);
    launch("softmax_backward", softmax_backward_kernel<T, n(), row_threads()>, grid_of(args.rows, row_threads),
           execution.stream, static_cast<const T*>(args.x), static_cast<const T*>(args.y), static_cast<T*>(args.result),
           args.rows, args.cols);
  });
}

}  // namespace fae::cuda
