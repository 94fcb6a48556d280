#pragma once

#include "../core/philox.h"
#include "accumulator.h"

// Dropout (core/philox.h) on accumulators. 16 rows by 16 columns become a left operand (sm80::as_left_operand), whose
// registers take their elements in pairs: words of random bits are put in the same places.

namespace fae::cuda {

// f(i, k, words) for every step k of every 16 rows i of an accumulator, or of the transpose if that is one: half b of
// words[r] is for element b of register r. row0 and col0, where `s` begins, are multiples of 16.
template <class Scores, class F>
__device__ __forceinline__ void for_each_dropout_call(const DropoutBits& bits, const Scores& s, int row0, int col0,
                                                      F&& f) {
  const int row = row0 + s.row(0, 0), col = col0 + s.col(0, 0);
  if constexpr (Scores::kNeighbours) {
    constexpr int M = Scores::kRowPieces, kSteps = Scores::kColPieces / 2;
    constexpr int kCalls = kSteps % 4 == 0 ? 4 : kSteps % 2 == 0 ? 2 : 1;  // whose products overlap
    const int row_group = DropoutBits::row_group(row), col_group = DropoutBits::col_group(col);
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int k = 0; k < kSteps; k += kCalls) {
        Philox4 calls[kCalls];
        bits.calls(
            calls, [&](int) { return row_group + i * DropoutBits::kRowGroups; },
            [&](int call) { return col_group + (k + call) * DropoutBits::kColGroups; });
#pragma unroll
        for (int call = 0; call < kCalls; ++call) f(i, k + call, calls[call].word);
      }
  } else {
    // A lane has two neighbouring rows of one column: one half of each word of two calls. It makes one of those, and
    // the lane with the column beside it the other.
    constexpr int kSteps = Scores::kRowPieces / 2, N = Scores::kColPieces;
    const bool odd = col % 2 != 0;
    const int row_group = DropoutBits::row_group(row + odd), col_group = DropoutBits::col_group(col);
    // Of two words each: the halves that the other lane wants, and a half of mine beside one of its, lower row first.
    const uint32_t theirs = odd ? 0x5410 : 0x7632, first = odd ? 0x3254 : 0x5410, second = odd ? 0x3276 : 0x7610;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Philox4 calls[N];
      bits.calls(
          calls, [&](int) { return row_group + k * DropoutBits::kRowGroups; },
          [&](int i) { return col_group + i * DropoutBits::kColGroups; });
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const uint32_t (&mine)[4] = calls[i].word;
        uint32_t words[4];
#pragma unroll
        for (int col_half = 0; col_half < 2; ++col_half) {
          const uint32_t upper = mine[2 * col_half], lower = mine[2 * col_half + 1];  // of the rows
          const uint32_t other = __shfl_xor_sync(0xffffffffu, __byte_perm(upper, lower, theirs), 4);
          words[col_half] = __byte_perm(upper, other, first);
          words[col_half + 2] = __byte_perm(lower, other, second);
        }
        f(i, k, words);
      }
    }
  }
}

// f(b, m, half, n, e) for the two elements b of register r, of 16 rows i and step k, and where `Scores` has them.
template <class Scores, class F>
__device__ __forceinline__ void for_each_in_register(int i, int k, int r, F&& f) {
#pragma unroll
  for (int b = 0; b < 2; ++b)
    if constexpr (Scores::kNeighbours)
      f(b, i, r % 2, 2 * k + r / 2, b);
    else
      f(b, 2 * k + r / 2, b, i, r % 2);
}

// The halves of a word that are not below a threshold, which is there twice, as 0xffff, the others as 0: numbers in
// float16, but for their signs, compare like their bits. What is no number is not below any.
constexpr uint32_t kMostHalvesThreshold = 0x7c00;  // infinity
#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t kept_halves(uint32_t word, uint32_t thresholds) {
  uint32_t kept;
  asm("{\n.reg .b32 x;\nabs.f16x2 x, %1;\nset.geu.u32.f16x2 %0, x, %2;\n}" : "=r"(kept) : "r"(word), "r"(thresholds));
  return kept;
}
#else
inline uint32_t kept_halves(uint32_t word, uint32_t thresholds) {
  const uint32_t low = word & 0x7fff, high = word >> 16 & 0x7fff;
  return (low >= (thresholds & 0xffff) ? 0xffffu : 0) | (high >= thresholds >> 16 ? 0xffff0000u : 0);
}
#endif

}  // namespace fae::cuda
