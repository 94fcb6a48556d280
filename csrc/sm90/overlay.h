#pragma once

#include "../core/problem.h"
#include "config.h"
#include "tile.h"

// A bias or a boolean mask ("overlay") where it is the only term of the scores: tiles of it come to shared memory
// beside those of the operands.

namespace fae::sm90 {

// Of the mask: rows of 64 or 128 bytes in the swizzle of the tensor memory accelerator for boxes as wide, which
// permutes the 16-byte chunks of a row by the number of its 128-byte line.
template <int kRows_, int kCols_>
struct MaskTile {
  using Element = uint8_t;
  static constexpr int kRows = kRows_, kCols = kCols_, kBlocks = 1, kBytes = kRows * kCols;
  static_assert(kCols == 64 || kCols == 128);

  uint32_t base;

  __device__ __forceinline__ uint32_t address(int row, int col) const {
    constexpr int kRowsPerLine = 128 / kCols, kChunks = kCols / 16;
    return base +
           static_cast<uint32_t>(row * kCols + ((col / 16 ^ row / kRowsPerLine) & (kChunks - 1)) * 16 + col % 16);
  }
};

template <class T, Terms kOverlay, int kRows, int kCols>
using OverlayTile =
    std::conditional_t<kOverlay == Terms::mask, MaskTile<kRows, kCols>, cuda::SharedTile<T, kRows, kCols>>;

template <Terms kOverlay>
FAE_INLINE const ScoreView& overlay_of(const Problem& p) {
  return kOverlay == Terms::mask ? p.mask : p.bias;
}
template <Terms kOverlay>
constexpr int kOverlayElementSize = kOverlay == Terms::mask ? 1 : 2;

// Starts the copy of a tile, by one thread, and of one back. What is the same for all rows comes in row 0.
template <class F>
__device__ __forceinline__ void at_score(const ScoreView& view, int row, int head, int batch, F&& f) {
  f(view.size_row == 1 ? 0 : row, view.size_head == 1 ? 0 : head, view.size_batch == 1 ? 0 : batch);
}
template <class Tile>
__device__ void load_overlay_tile(const Tile& tile, const TensorMap& map, const ScoreView& view, int row, int col,
                                  int head, int batch, uint32_t barrier) {
  constexpr int kCols = Tile::kCols / Tile::kBlocks;
  at_score(view, row, head, batch, [&](int r, int h, int b) {
    for (int block = 0; block < Tile::kBlocks; ++block)
      load_box(tile.address(0, block * kCols), map, col + block * kCols, r, h, b, barrier);
  });
}
template <class Tile>
__device__ void store_overlay_tile(const Tile& tile, const TensorMap& map, const ScoreView& view, int row, int col,
                                   int head, int batch) {
  constexpr int kCols = Tile::kCols / Tile::kBlocks;
  at_score(view, row, head, batch, [&](int r, int h, int b) {
    for (int block = 0; block < Tile::kBlocks; ++block)
      store_box(map, col + block * kCols, r, h, b, tile.address(0, block * kCols));
  });
}

// ---- As accumulators have them --------------------------------------------------------------------------------------

// f(m, half, n, e, element) for the elements of a warp's 16 rows: row0 and the rows that follow it, or, where they have
// one row in common, row0 16 times.
template <class T, int kRows, int kCols, class F>
__device__ __forceinline__ void for_each_element(const cuda::SharedTile<T, kRows, kCols>& tile, int row0,
                                                 bool in_common, F&& f) {
  const int lane = opaque(lane_index());
  const uint32_t first = tile.address(row0 + (in_common ? 0 : lane % 16), 0) ^ lane / 16 * 16;
#pragma unroll
  for (int pair = 0; pair < kCols / 16; ++pair) {
    uint32_t words[4];
    sm80::load_matrices((first ^ (pair % 4 * 32)) + pair / 4 * kRows * cuda::kSwizzleBytes, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T elements[2];
      memcpy(static_cast<void*>(elements), &words[i], sizeof(elements));
#pragma unroll
      for (int e = 0; e < 2; ++e) f(0, i % 2, 2 * pair + i / 2, e, elements[e]);
    }
  }
}
template <int kRows, int kCols, class F>
__device__ __forceinline__ void for_each_element(const MaskTile<kRows, kCols>& tile, int row0, bool in_common, F&& f) {
  const int lane = opaque(lane_index());
  const uint32_t first = tile.address(row0 + (in_common ? 0 : lane / 4), lane % 4 * 2);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
      const uint32_t pair =
          load_shared_2_bytes((first ^ (n / 2 * 16)) + n % 2 * 8 + (in_common ? 0 : half * 8 * kCols));
#pragma unroll
      for (int e = 0; e < 2; ++e) f(0, half, n, e, static_cast<uint8_t>(pair >> 8 * e));
    }
}

// The same for the transpose of 16 columns from col0 on, f(m, half, e, element): column lane / 4 + 8 e of row
// 8 m + lane % 4 * 2 + half.
template <class T, int kRows, int kCols, class F>
__device__ __forceinline__ void for_each_transposed_element(const cuda::SharedTile<T, kRows, kCols>& tile, int col0,
                                                            bool in_common, F&& f) {
  const int lane = opaque(lane_index());
  const uint32_t first = tile.address(in_common ? 0 : lane % 16, col0 + lane / 16 * 8);
#pragma unroll
  for (int pair = 0; pair < kRows / 16; ++pair) {
    uint32_t words[4];
    sm80::load_matrices_transposed(first + (in_common ? 0 : pair * 16 * cuda::kSwizzleBytes), words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T elements[2];
      memcpy(static_cast<void*>(elements), &words[i], sizeof(elements));
#pragma unroll
      for (int half = 0; half < 2; ++half) f(2 * pair + i % 2, half, i / 2, elements[half]);
    }
  }
}
template <int kRows, int kCols, class F>
__device__ __forceinline__ void for_each_transposed_element(const MaskTile<kRows, kCols>& tile, int col0,
                                                            bool in_common, F&& f) {
  const int lane = opaque(lane_index());
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t first = tile.address(in_common ? 0 : lane % 4 * 2 + half, col0 + lane / 4);
#pragma unroll
    for (int m = 0; m < kRows / 8; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(m, half, e, load_shared_byte(first + 8 * e + (in_common ? 0 : m * 8 * kCols)));
  }
}

}  // namespace fae::sm90
