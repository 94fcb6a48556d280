#pragma once

#include "simd.h"

// The five products of attention are one operation here: C (+)= A B with A broadcast element by element and B read in
// whole vectors, accumulated in a block of registers.

namespace fae::cpu::FAE_LEVEL {

// A register block of kTileRows x kTileVectors accumulators fills the register file: 24 of 32, 12 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// Rows that go past a block of keys together: first all of them past K, then past V, so that each stays in the
// first-level cache for several register blocks.
constexpr int64_t kStripRows = 4 * kTileRows;

// The error of a sum grows with the length of its chain of additions. Chains of 128 leave scores of head dim 512 with
// 0.4 of the error of a single chain, those of head dim 256 with 0.6, in the same time.
constexpr int64_t kLongestChain = 128;

template <class T>
struct Gemm {
  const T* a = nullptr;  // a(i, k) = a[i * a_row + k * a_k]: either matrix order serves
  int64_t a_row = 0, a_k = 1;
  const T* b = nullptr;  // b(k, j) = b[k * ldb + j]
  int64_t ldb = 0;
  T* c = nullptr;  // c(i, j) = c[i * ldc + j]
  int64_t ldc = 0;
  int64_t rows = 0, cols = 0, depth = 0;  // cols is a multiple of the vector width
  bool accumulate = false;
};

// Sums start at zero and C is added at the end: one long chain of additions through memory doubles the error.
template <class T, int Rows, int Vectors>
__attribute__((noinline)) void gemm_tile(const Gemm<T>& g, int64_t row, int64_t col) {
  constexpr int W = Vec<T>::width;
  const T* a = g.a + row * g.a_row;
  const T* b = g.b + col;
  Vec<T> acc[Rows][Vectors];
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) acc[i][j] = T(0);

  for (int64_t k = 0; k < g.depth; ++k, a += g.a_k, b += g.ldb) {
    Vec<T> b_row[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) b_row[j] = Vec<T>::load(b + j * W);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> a_ik = a[i * g.a_row];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] += a_ik * b_row[j];
    }
  }

  T* c = g.c + row * g.ldc + col;
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i, c += g.ldc)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      if (g.accumulate) acc[i][j] += Vec<T>::load(c + j * W);
      acc[i][j].store(c + j * W);
    }
}

template <class T, int Vectors>
constexpr decltype(&gemm_tile<T, 1, 1>) kGemmTiles[kTileRows] = {gemm_tile<T, 1, Vectors>, gemm_tile<T, 2, Vectors>,
                                                                 gemm_tile<T, 3, Vectors>, gemm_tile<T, 4, Vectors>,
                                                                 gemm_tile<T, 5, Vectors>, gemm_tile<T, 6, Vectors>};

template <class T, int Vectors>
FAE_INLINE void gemm_panel(const Gemm<T>& g, int64_t col) {
  for (int64_t row = 0; row < g.rows; row += kTileRows) {
    const int64_t rows = g.rows - row < kTileRows ? g.rows - row : kTileRows;
    kGemmTiles<T, Vectors>[rows - 1](g, row, col);
  }
}

template <class T>
void gemm_chain(const Gemm<T>& g) {
  constexpr int W = Vec<T>::width;
  int64_t col = 0;
  for (; col + kTileVectors * W <= g.cols; col += kTileVectors * W) gemm_panel<T, kTileVectors>(g, col);
  switch ((g.cols - col) / W) {
    case 3:
      gemm_panel<T, 3>(g, col);
      break;
    case 2:
      gemm_panel<T, 2>(g, col);
      break;
    case 1:
      gemm_panel<T, 1>(g, col);
      break;
  }
}

template <class T>
void gemm(Gemm<T> g) {
  int64_t left = g.depth;
  do {
    g.depth = left < kLongestChain ? left : kLongestChain;
    gemm_chain(g);
    g.a += g.depth * g.a_k;
    g.b += g.depth * g.ldb;
    g.accumulate = true;
    left -= g.depth;
  } while (left > 0);
}

}  // namespace fae::cpu::FAE_LEVEL
