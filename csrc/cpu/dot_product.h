#pragma once

#include "tiles.h"

// Products of tiles on AVX-512's dot product of pairs of bfloat16 (vdpbf16ps), for machines without a tile unit.

namespace fae::cpu::FAE_LEVEL {

struct TileUnit {
  TileUnit() {}  // nothing to set up
};

// Rows of C that are accumulated at a time: 8 x 2 of the 32 registers hide the latency of vdpbf16ps and reach 96 % of
// its rate. More rows gain nothing, and a single vector a row loads too much.
constexpr int64_t kDotRows = 8;

// A pair of A, broadcast, times 16 pairs of B. Sums start at zero and C is added at the end: one long chain of
// additions through memory doubles the error.
template <bool Accumulate>
FAE_INLINE void strip_product(const bfloat16* a, int64_t a_step, TilePairs b, int64_t depth, float* c, int64_t ld) {
  __m512 sums[kDotRows][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kDotRows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();

  for (int64_t k = 0; k < depth; ++k, a += a_step, b.data += b.step)
    for (int64_t pair = 0; pair < kTileSize; ++pair) {
      const bfloat16* b_row = b.data + pair * kTileDepth;
      const __m512bh b_pairs[2] = {(__m512bh)_mm512_loadu_si512(b_row), (__m512bh)_mm512_loadu_si512(b_row + b.pair)};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kDotRows; ++i) {
        int32_t a_pair;
        std::memcpy(&a_pair, a + i * kTileDepth + 2 * pair, sizeof(a_pair));
        const __m512bh a_pairs = (__m512bh)_mm512_set1_epi32(a_pair);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], a_pairs, b_pairs[0]);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], a_pairs, b_pairs[1]);
      }
    }

#pragma GCC unroll 8
  for (int64_t i = 0; i < kDotRows; ++i, c += ld)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {
      float* out = c + half * kTileSize;
      if constexpr (Accumulate) sums[i][half] += _mm512_loadu_ps(out);
      _mm512_storeu_ps(out, sums[i][half]);
    }
}

template <bool Accumulate>
FAE_INLINE void block_product(TilePairs a, TilePairs b, int64_t depth, float* c, int64_t ld) {
  for (int64_t tile = 0; tile < 2; ++tile, a.data += a.pair)
    for (int64_t i = 0; i < kTileSize; i += kDotRows, c += kDotRows * ld)
      strip_product<Accumulate>(a.data + i * kTileDepth, a.step, b, depth, c, ld);
}

}  // namespace fae::cpu::FAE_LEVEL
