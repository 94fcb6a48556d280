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
// by columns {c, c + 1, c + 8, c + 9}. Its four words are those of the left operand that such elements become: word
// 0 and 2 are of row r, the first two of columns {c, c + 1}. An element has 15 bits, the lower ones of a word's half.
struct DropoutBits {
  uint32_t seed0 = 0, seed1 = 0, offset = 0, batch_head = 0;

  static constexpr int kBits = 15;
  static constexpr uint32_t kMask = (1u << kBits) - 1;

  // Number of a row's or column's group; those of a block 16 further on are kRowGroups and kColGroups larger.
  static constexpr int kRowGroups = 8, kColGroups = 4;
  template <class Int>
  static FAE_INLINE Int row_group(Int row) {
    return (row >> 4) * kRowGroups + (row & 7);
  }
  template <class Int>
  static FAE_INLINE Int col_group(Int col) {
    return (col >> 4) * kColGroups + ((col >> 1) & 3);
  }
  // The calls for N pairs of groups.
  template <int N, class RowGroup, class ColGroup>
  FAE_INLINE void calls(Philox4 (&x)[N], RowGroup&& row_group, ColGroup&& col_group) const {
    for (int i = 0; i < N; ++i)
      x[i] = {{static_cast<uint32_t>(col_group(i)), static_cast<uint32_t>(row_group(i)), batch_head, offset}};
    philox4x32(x, seed0, seed1);
  }
  static FAE_INLINE int word_of(int64_t row, int64_t col) {
    return static_cast<int>((row >> 3 & 1) + (col >> 3 & 1) * 2);
  }
  static FAE_INLINE int shift_of(int64_t col) { return static_cast<int>(col & 1) * 16; }

  FAE_INLINE uint32_t bits(int64_t row, int64_t col) const {
    Philox4 call[1];
    calls(call, [&](int) { return row_group(row); }, [&](int) { return col_group(col); });
    return call[0].word[word_of(row, col)] >> shift_of(col) & kMask;
  }
};

FAE_INLINE DropoutBits dropout_bits(const Problem& p, int64_t b, int64_t head) {
  const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(p.rng_state[1]),
          static_cast<uint32_t>(b * p.heads + head)};
}

// An element is dropped when its bits are below the threshold: the probability is p to the nearest 2^-15.
FAE_INLINE uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(dropout_p * (1 << DropoutBits::kBits) + 0.5);
}

// Kept elements are scaled by 1 / (1 - p); with everything dropped the factor is never used.
FAE_INLINE double dropout_scale(double dropout_p) { return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0; }

}  // namespace fae
