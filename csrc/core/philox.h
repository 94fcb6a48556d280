#pragma once

#include "problem.h"

// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and how dropout uses it. Seven
// rounds pass all of BigCrush; the usual ten add a margin that dropout has no use for.

namespace fae {

struct Philox4 {
  uint32_t word[4];
};

FAE_INLINE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Dropout bits belong to (seed, offset, batch, head, row, column), so that every backend and every tiling drops the
// same elements. One call serves the eight elements that one lane of an mma / wgmma accumulator holds: rows {r, r + 8}
// by columns {c, c + 1, c + 8, c + 9}; the row picks a 16-bit half, the column one of the four words.
struct DropoutBits {
  uint32_t seed0 = 0, seed1 = 0, offset = 0, batch_head = 0;

  FAE_INLINE Philox4 block(int64_t row, int64_t col) const {
    const uint32_t row_group = static_cast<uint32_t>((row >> 4) * 8 + (row & 7));
    const uint32_t col_group = static_cast<uint32_t>((col >> 4) * 4 + ((col >> 1) & 3));
    return philox4x32({{col_group, row_group, batch_head, offset}}, seed0, seed1);
  }
  static FAE_INLINE int word_of(int64_t col) { return static_cast<int>(((col >> 3) & 1) * 2 + (col & 1)); }
  static FAE_INLINE int shift_of(int64_t row) { return static_cast<int>(((row >> 3) & 1) * 16); }

  FAE_INLINE uint32_t bits(int64_t row, int64_t col) const {
    return (block(row, col).word[word_of(col)] >> shift_of(row)) & 0xffffu;
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
