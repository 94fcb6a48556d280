#pragma once

#include "../core/softmax.h"

namespace fae::cuda {

template <class T>
__device__ T shuffle_xor(unsigned mask, T x, int offset) {
  return __shfl_xor_sync(mask, x, offset);
}
template <class T>
__device__ RowState<T> shuffle_xor(unsigned mask, RowState<T> x, int offset) {
  return {__shfl_xor_sync(mask, x.m, offset), __shfl_xor_sync(mask, x.l, offset)};
}

template <class T>
__device__ T shuffle_first(unsigned mask, T x, int width) {
  return __shfl_sync(mask, x, 0, width);
}
template <class T>
__device__ RowState<T> shuffle_first(unsigned mask, RowState<T> x, int width) {
  return {__shfl_sync(mask, x.m, 0, width), __shfl_sync(mask, x.l, 0, width)};
}

template <class T>
__device__ void join(T& sum, T x) {
  sum += x;
}
template <class T>
__device__ void join(RowState<T>& state, RowState<T> other) {
  state.join(other);
}

// Threads that work on one row: a power of two, up to a warp or else a whole block. Sums are joined in an order that
// depends on the number of threads alone.
template <int kThreads>
struct Group {
  static_assert((kThreads & (kThreads - 1)) == 0 && kThreads <= 1024);

  // This thread's number in its group; the group's first row, and the groups in the grid, for a loop over rows.
  static __device__ int lane() { return threadIdx.x % kThreads; }
  static __device__ int64_t first_row() {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kThreads;
  }
  static __device__ int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kThreads; }

  // Joins the values of all threads of the group; all of them get the result.
  template <class V>
  static __device__ V all_join(V value) {
    value = join_lanes<(kThreads < 32 ? kThreads : 32)>(value);
    if constexpr (kThreads > 32) {
      constexpr int kWarps = kThreads / 32;
      __shared__ V warps[kWarps];
      __syncthreads();  // an earlier call's results have been read
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
      __syncthreads();
      value = join_lanes<kWarps>(warps[threadIdx.x % kWarps]);
    }
    return value;
  }

 private:
  // Of so many neighbouring lanes. In pairs: few roundings follow each other.
  template <int kWidth, class V>
  static __device__ V join_lanes(V value) {
    // Groups of one warp may be at different rows: only the threads of this one take part.
    const unsigned mask = kWidth == 32 ? 0xffffffffu : ((1u << kWidth) - 1) << (threadIdx.x % 32 / kWidth * kWidth);
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2) join(value, shuffle_xor(mask, value, offset));
    return shuffle_first(mask, value, kWidth);  // whose turn it is to be rescaled differs by lane, and so does rounding
  }
};

}  // namespace fae::cuda
