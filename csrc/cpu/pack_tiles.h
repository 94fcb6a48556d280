#pragma once

#include "pack.h"
#include "tiles.h"

// Rows of bfloat16 rearranged into tiles: 1 KB each, one after another. A matrix X can enter a product on either side
// and transposed or not, which makes four packings. Rows and columns beyond X's extent are zeros: every tile is whole,
// and what lies behind a tensor never meets a product (0 * NaN is NaN).

namespace fae::cpu::FAE_LEVEL {

using Halves = NativeVector<uint16_t, kTileDepth>::type;  // a row of a tile

FAE_INLINE int64_t padded_dim(int64_t dim) { return (dim + kTileDepth - 1) / kTileDepth * kTileDepth; }

// X: `rows` x `cols` elements of one head.
struct Matrix {
  const bfloat16* data;
  int64_t stride, rows, cols;

  Matrix(const Rows& source, int64_t rows_, int64_t cols_)
      : data(static_cast<const bfloat16*>(source.data)), stride(source.stride), rows(rows_), cols(cols_) {}
};

// A tile at the edge of X: what lies inside, and zeros.
inline void copy_edge(const Matrix& x, int64_t row, int64_t col, bfloat16* tile) {
  std::memset(tile, 0, kTileElements * sizeof(bfloat16));
  const int64_t rows = x.rows - row < kTileSize ? x.rows - row : kTileSize;
  const int64_t cols = x.cols - col < kTileDepth ? x.cols - col : kTileDepth;
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(tile + i * kTileDepth, x.data + (row + i) * x.stride + col, static_cast<size_t>(cols) * 2);
}

// Rows row .. row + 15 of X, columns col .. col + 31. Rows of a head lie too far apart for the hardware's prefetchers,
// so each one asks for the row that is due a few tiles later.
FAE_INLINE void load_tile(const Matrix& x, int64_t row, int64_t col, Halves (&tile)[kTileSize]) {
  constexpr int64_t kRowsAhead = 64;
  alignas(64) bfloat16 edge[kTileElements];
  const bfloat16* source = x.data + row * x.stride + col;
  int64_t stride = x.stride;
  if (row + kTileSize > x.rows || col + kTileDepth > x.cols) {
    copy_edge(x, row, col, edge);
    source = edge;
    stride = kTileDepth;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileSize; ++i, source += stride) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(source) + 2 * kRowsAhead * stride));
    std::memcpy(&tile[i], source, sizeof(tile[i]));
  }
}

FAE_INLINE void store_row(Halves x, bfloat16* tile, int64_t row) {
  std::memcpy(tile + row * kTileDepth, &x, sizeof(x));
}

// A pair of rows element by element: a0 b0 a1 b1 ..., its first and its second 32 elements; and the way back.
using HalfLanes = std::make_integer_sequence<int, kTileDepth>;
FAE_INLINE Halves zip_low(Halves a, Halves b) { return interleave_low(a, b, HalfLanes{}); }
FAE_INLINE Halves zip_high(Halves a, Halves b) { return interleave_high(a, b, HalfLanes{}); }

template <int Odd, int... I>
FAE_INLINE Halves unzip(Halves a, Halves b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}

// The same, transposed as 16 x 16 pairs of columns: row p is columns 2p and 2p + 1 of all rows.
FAE_INLINE void load_tile_transposed(const Matrix& x, int64_t row, int64_t col, Halves (&tile)[kTileSize]) {
  load_tile(x, row, col, tile);
  Vec<float> pairs[kTileSize];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileSize; ++i) pairs[i].v = reinterpret_cast<Vec<float>::Native>(tile[i]);
  transpose<float>(pairs);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileSize; ++i) tile[i] = reinterpret_cast<Halves>(pairs[i].v);
}

// X on the left: tiles [rows / 16][dim / 32] of 16 rows by 32 columns.
inline void pack_left(const Matrix& x, int64_t rows, bfloat16* tile) {
  for (int64_t row = 0; row < rows; row += kTileSize)
    for (int64_t col = 0; col < x.cols; col += kTileDepth, tile += kTileElements) {
      Halves x_tile[kTileSize];
      load_tile(x, row, col, x_tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileSize; ++i) store_row(x_tile[i], tile, i);
    }
}

// X^T on the right: tiles [rows / 16][dim / 32] of 32 columns of X by 16 rows.
inline void pack_right_transposed(const Matrix& x, int64_t rows, bfloat16* tile) {
  for (int64_t row = 0; row < rows; row += kTileSize)
    for (int64_t col = 0; col < x.cols; col += kTileDepth, tile += kTileElements) {
      Halves x_tile[kTileSize];
      load_tile_transposed(x, row, col, x_tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileSize; ++i) store_row(x_tile[i], tile, i);
    }
}

// X on the right: tiles [rows / 32][dim / 16] of 32 rows by 16 columns, two columns of tiles at a time.
inline void pack_right(const Matrix& x, int64_t rows, bfloat16* tile) {
  for (int64_t row = 0; row < rows; row += kTileDepth)
    for (int64_t col = 0; col < x.cols; col += kTileDepth, tile += 2 * kTileElements)
      for (int64_t half = 0; half < kTileDepth; half += kTileSize) {
        Halves x_tile[kTileSize];
        load_tile(x, row + half, col, x_tile);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kTileSize; i += 2) {
          store_row(zip_low(x_tile[i], x_tile[i + 1]), tile, (half + i) / 2);
          store_row(zip_high(x_tile[i], x_tile[i + 1]), tile + kTileElements, (half + i) / 2);
        }
      }
}

// X^T on the left: tiles [rows / 32][dim / 16] of 16 columns of X by 32 rows, two columns of X's tiles at a time.
inline void pack_left_transposed(const Matrix& x, int64_t rows, bfloat16* tile) {
  for (int64_t row = 0; row < rows; row += kTileDepth)
    for (int64_t col = 0; col < x.cols; col += kTileDepth, tile += 2 * kTileElements) {
      Halves low[kTileSize], high[kTileSize];
      load_tile_transposed(x, row, col, low);
      load_tile_transposed(x, row + kTileSize, col, high);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileSize; ++i) {
        store_row(unzip<0>(low[i], high[i], HalfLanes{}), tile, 2 * i);
        store_row(unzip<1>(low[i], high[i], HalfLanes{}), tile, 2 * i + 1);
      }
    }
}

// Two vectors rounded to nearest even, one behind the other: a row of a left tile.
FAE_INLINE Halves to_halves(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Halves>(_mm512_cvtne2ps_pbh(high.v, low.v));
#else
  Halves x;
  bfloat16 buffer[kTileDepth];
  store_as<bfloat16>(low, buffer);
  store_as<bfloat16>(high, buffer + kTileSize);
  std::memcpy(&x, buffer, sizeof(x));
  return x;
#endif
}

// Y[row][col .. col + 16) = x, as far as its `cols` columns reach.
FAE_INLINE void write_vector(Vec<float> x, const Rows& y, int64_t row, int64_t col, int64_t cols) {
  store_as<bfloat16>(x, static_cast<bfloat16*>(y.data) + row * y.stride + col, cols - col);
}

}  // namespace fae::cpu::FAE_LEVEL
