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

// Four bytes of x and y, whose own are numbers 0 to 3 and 4 to 7: a digit of the selector each, the lowest byte's last.
FAE_INLINE uint32_t select_bytes(uint32_t x, uint32_t y, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, y, selector);
#else
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) selected |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return selected;
#endif
}

// Dropout bits belong to (seed, offset, batch, head, row, column), so that every backend and every tiling drops the
// same elements. One call serves the sixteen elements that two lanes of an mma / wgmma accumulator hold: rows {r, r +
// 1, r + 8, r + 9} by columns {c, c + 1, c + 8, c + 9}, r and c even. Words 0 and 2 are of rows r and r + 1, the first
// two of columns {c, c + 1}; the upper half is of the odd row, and its upper byte of the odd column.
//
// A byte is too coarse for a probability: the value of an element is 15 bits, the lower seven of its own byte above a
// tie byte, the exclusive or of two others' own bytes. Of any two elements of a call, these four bytes are independent:
// so are their values, exactly.
struct DropoutBits {
  uint32_t seed0 = 0, seed1 = 0, offset = 0, batch_head = 0;

  static constexpr int kBits = 15;
  static constexpr uint32_t kMask = (1u << kBits) - 1;

  // Number of a row's or column's group; those of a block 16 further on are kGroups larger.
  static constexpr int kGroups = 4;
  template <class Int>
  static FAE_INLINE Int group(Int row_or_col) {
    return (row_or_col >> 4) * kGroups + (row_or_col >> 1 & 3);
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

  // The own bytes of the elements in rows of one parity: p is of words 0 and 1, q of words 2 and 3, each the even
  // column of a word, then the odd one.
  struct RowBytes {
    uint32_t word[2];  // p and q
  };
  static FAE_INLINE RowBytes row_bytes(const Philox4& call, bool odd_row) {
    const uint32_t half = odd_row ? 0x7632 : 0x5410;
    return {select_bytes(call.word[0], call.word[1], half), select_bytes(call.word[2], call.word[3], half)};
  }
  // Their values, in the words of the call: the lower half is of the even column. Bit 15 of a half means nothing. With
  // x[b] = p[b] ^ q[b] and y[b] = p[b] ^ q[b + 2], modulo 4, the tie of p[b] is x[b + 1], that of q[b] is y[b + 1].
  static FAE_INLINE Philox4 row_values(const RowBytes& bytes) {
    const auto [p, q] = bytes.word;
    const uint32_t p_ties = p ^ q, q_ties = p ^ select_bytes(q, q, 0x1032);
    constexpr uint32_t kFirst = 0x1605, kSecond = 0x3427;  // bytes {0, 1} above ties {1, 2}, {2, 3} above {3, 0}
    return {{select_bytes(p, p_ties, kFirst), select_bytes(p, p_ties, kSecond), select_bytes(q, q_ties, kFirst),
             select_bytes(q, q_ties, kSecond)}};
  }
  // The same for columns of one parity: the lower half is of the even row.
  static FAE_INLINE Philox4 col_values(const Philox4& call, bool odd_col) {
    const uint32_t (&word)[4] = call.word;
    const uint32_t ties[4] = {word[0] ^ word[2], word[1] ^ word[3], word[0] ^ word[3], word[1] ^ word[2]};
    Philox4 values;
    for (int i = 0; i < 4; ++i)
      values.word[i] = odd_col ? select_bytes(word[i], ties[i ^ 1], 0x3614) : select_bytes(word[i], ties[i], 0x2705);
    return values;
  }

  // In one row: values[0] is of columns {c, c + 1}, values[1] of {c + 8, c + 9}. The same in fewer instructions,
  // where there is none that selects bytes.
  static FAE_INLINE void values_of_row(const Philox4& call, int64_t row, uint32_t (&values)[2]) {
    const uint32_t* const word = call.word;
    const int second = word_of(row, 0), first = 1 - second, shift = static_cast<int>(row & 1) * 16;
    const auto value = [&](uint32_t own, uint32_t even_tie, uint32_t odd_tie) {
      own >>= shift, even_tie >>= shift, odd_tie >>= shift;
      return (own & 0xff) << 8 | (even_tie >> 8 & 0xff) | ((own & 0xff00) | (odd_tie & 0xff)) << 16;
    };
    values[0] = value(word[second], word[second] ^ word[2 + second], word[first] ^ word[2 + first]);
    values[1] = value(word[2 + second], word[second] ^ word[2 + first], word[first] ^ word[2 + second]);
  }

  FAE_INLINE uint32_t bits(int64_t row, int64_t col) const {
    Philox4 call[1];
    calls(call, [&](int) { return group(row); }, [&](int) { return group(col); });
    return row_values(row_bytes(call[0], row & 1)).word[word_of(row, col)] >> shift_of(col) & kMask;
  }
};

FAE_INLINE DropoutBits dropout_bits(const Problem& p, int64_t b, int64_t head) {
  const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(p.rng_state[1]),
          static_cast<uint32_t>(b * p.heads + head)};
}

// An element is dropped when its value is below the threshold: the probability is p to the nearest 2^-15.
FAE_INLINE uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(dropout_p * (1 << DropoutBits::kBits) + 0.5);
}

// Kept elements are scaled by 1 / (1 - p); with everything dropped the factor is never used.
FAE_INLINE double dropout_scale(double dropout_p) { return dropout_p < 1.0 ? 1.0 / (1.0 - dropout_p) : 0.0; }

}  // namespace fae
