#pragma once

#include "device.h"

// Registers of one warp that hold a matrix of 16 M rows by 8 N columns of float, spread over the lanes as mma.sync and
// wgmma leave it. Each lane has rows lane / 4 and lane / 4 + 8 ("halves") of every 16, and two neighbouring columns,
// 2 (lane % 4) and the next, of every 8. The four lanes of a quad hold a row together.

namespace fae::cuda {

constexpr float kLog2e = 1.44269504f;

template <int M, int N>
struct Accumulator {
  static constexpr int kRows = 16 * M, kCols = 8 * N, kRowPieces = M, kColPieces = N;
  static constexpr bool kNeighbours = true;  // elements e = 0 and 1 lie side by side in a row
  float x[M][N][4];

  __device__ __forceinline__ float& at(int m, int half, int n, int e) { return x[m][n][2 * half + e]; }
  __device__ __forceinline__ float at(int m, int half, int n, int e) const { return x[m][n][2 * half + e]; }

  static __device__ __forceinline__ int row(int m, int half) { return 16 * m + 8 * half + lane_index() / 4; }
  static __device__ __forceinline__ int col(int n, int e) { return col_step(n, e) + lane_index() % 4 * 2; }
  static __device__ __forceinline__ constexpr int col_step(int n, int e) {
    return 8 * n + e;
  }  // the same for all lanes

  // f(m, half, n, e) for every element that this lane holds, row by row.
  template <class F>
  static __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) f(m, half, n, e);
  }
  // f(m, half) for every row.
  template <class F>
  static __device__ __forceinline__ void for_each_row(F&& f) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half);
  }

  __device__ __forceinline__ void fill(float value) {
    for_each([&](int m, int half, int n, int e) { at(m, half, n, e) = value; });
  }
};

// A matrix of 8 M rows by 16 N columns whose transpose is an accumulator, with the names of one: a lane has rows
// 2 (lane % 4) and the next of every 8, and columns lane / 4 and lane / 4 + 8 of every 16.
template <int M, int N>
struct TransposedAccumulator {
  static constexpr int kRows = 8 * M, kCols = 16 * N, kRowPieces = M, kColPieces = N;
  static constexpr bool kNeighbours = false;
  Accumulator<N, M> transpose;

  __device__ __forceinline__ float& at(int m, int half, int n, int e) { return transpose.x[n][m][2 * e + half]; }
  __device__ __forceinline__ float at(int m, int half, int n, int e) const { return transpose.x[n][m][2 * e + half]; }

  static __device__ __forceinline__ int row(int m, int half) { return 8 * m + lane_index() % 4 * 2 + half; }
  static __device__ __forceinline__ int col(int n, int e) { return col_step(n, e) + lane_index() / 4; }
  static __device__ __forceinline__ constexpr int col_step(int n, int e) { return 16 * n + 8 * e; }

  template <class F>
  static __device__ __forceinline__ void for_each(F&& f) {
    Accumulator<M, N>::for_each(f);
  }
  template <class F>
  static __device__ __forceinline__ void for_each_row(F&& f) {
    Accumulator<M, N>::for_each_row(f);
  }

  __device__ __forceinline__ void fill(float value) { transpose.fill(value); }
};

// The same where `lane` says which thread's it is. Of a lane that the compiler cannot see through, rows and columns are
// worked out where they are needed, and take no registers through the loops before.
template <int M, int N>
struct PlacedAccumulator : TransposedAccumulator<M, N> {
  int lane;

  __device__ __forceinline__ int row(int m, int half) const { return 8 * m + lane % 4 * 2 + half; }
  __device__ __forceinline__ int col(int n, int e) const {
    return TransposedAccumulator<M, N>::col_step(n, e) + lane / 4;
  }
};

// Sum or maximum over a row's quad; all four lanes get it.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace fae::cuda
