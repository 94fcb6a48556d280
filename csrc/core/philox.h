#pragma once

#include "problem.h"

// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and how dropout uses it. Seven
// rounds pass all of BigCrush; the usual ten add a margin that dropout has no use for.

namespace fae {

struct Philox4 {
  uint32_t word[4];
};

// N counters become as many results. They share the keys of a round, and their products overlap.
template <int N>
FAE_INLINE void philox4x32(Philox4 (&x)[N], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < N; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * x[i].word[0];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * x[i].word[2];
      x[i] = {{static_cast<uint32_t>(product1 >> 32) ^ x[i].word[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ x[i].word[3] ^ key1, static_cast<uint32_t>(product0)}};
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Dropout bits belong to (seed, offset, batch, head, row, column), so that every backend and every tiling drops the
// same elements. One call serves the eight elements that one lane of an mma / wgmma accumulator holds: rows {r, r + 8}
// by columns {c, c + 1, c + 8, c + 9}; the row picks a 16-bit half, the column one of the four words.
struct DropoutBits {
  uint32_t seed0 = 0, seed1 = 0, offset = 0, batch_head = 0;

  // Results of the calls for N elements, of row(i) and col(i).
  template <int N, class Row, class Col>
  FAE_INLINE void blocks(Philox4 (&x)[N], Row&& row, Col&& col) const {
    for (int i = 0; i < N; ++i) {
      const auto r = row(i);
      const auto c = col(i);
      const uint32_t row_group = static_cast<uint32_t>((r >> 4) * 8 + (r & 7));
      const uint32_t col_group = static_cast<uint32_t>((c >> 4) * 4 + ((c >> 1) & 3));
      x[i] = {{col_group, row_group, batch_head, offset}};
    }
    philox4x32(x, seed0, seed1);
  }
  static FAE_INLINE int word_of(int64_t col) { return static_cast<int>(((col >> 3) & 1) * 2 + (col & 1)); }
  static FAE_INLINE int shift_of(int64_t row) { return static_cast<int>(((row >> 3) & 1) * 16); }

  FAE_INLINE uint32_t bits(int64_t row, int64_t col) const {
    Philox4 block[1];
    blocks(block, [&](int) { return row; }, [&](int) { return col; });
    return (block[0].word[word_of(col)] >> shift_of(row)) & 0xffffu;
  }
};

FAE_INLINE DropoutBits dropout_bits(const Problem& p, int64_t b, int64_t head) {
  const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(p.rng_state[1]),
          static_cast<uint32_t>(b * p.heads + head)};
}

// An element is dropped when its 16 bits are below the threshold: the probability is p to the nearest 2^-16.
FAE_INLINE uint32_t dropout_threshold(double dropout_p) { return static_cast<uint32_t>(dropout_p * 65536.0 + 0.5); }

// Kept elements are scaled by 1 / (1 - p); with everything dropped the factor is never used.
FAE_INLINE double dropout_scale(double dropout_p) { return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0; }

}  // namespace fae
