#pragma once

#include "../core/philox.h"
#include "accumulator.h"

// Dropout (core/philox.h) on accumulators. A block of 16 rows by 16 columns becomes a left operand
// (sm80::as_left_operand), whose registers take their elements in pairs: words of random bits are put in the same
// places.

namespace fae::cuda {

// RowBytes, or Philox4.
template <class Words>
__device__ __forceinline__ Words choose(bool second, const Words& x, const Words& y) {
  Words chosen;
#pragma unroll
  for (size_t i = 0; i < sizeof(Words) / sizeof(uint32_t); ++i) chosen.word[i] = second ? y.word[i] : x.word[i];
  return chosen;
}
// For what the lane with the row beside this one's, or the column beside it of a transpose, gives for this lane.
template <class Words>
__device__ __forceinline__ Words exchange(Words x) {
#pragma unroll
  for (uint32_t& word : x.word) word = __shfl_xor_sync(0xffffffffu, word, 4);
  return x;
}

// f(i, k, words) for every step k of every 16 rows i of an accumulator, or of the transpose if that is one: half b of
// words[r] is for element b of register r. row0 and col0, where `s` begins, are multiples of 16.
template <class Scores, class F>
__device__ __forceinline__ void for_each_dropout_call(const DropoutBits& bits, const Scores& s, int row0, int col0,
                                                      F&& f) {
  // Two lanes share a call: one has its even rows, or columns of a transpose, the other one the odd ones. Of two
  // blocks, the first lane makes the call of the first, the other lane that of the second, and each gives the other its
  // part. Both make the call of a last block that has no other beside it.
  constexpr bool kNeighbours = Scores::kNeighbours;
  constexpr int kColBlocks = Scores::kCols / 16, kBlocks = Scores::kRows / 16 * kColBlocks;
  constexpr int kCalls = kColBlocks < 4 ? 1 : kColBlocks < 8 ? kColBlocks / 2 : 4;  // whose products overlap
  const int row = row0 + s.row(0, 0), col = col0 + s.col(0, 0);
  const int row_group = DropoutBits::group(row), col_group = DropoutBits::group(col);
  const bool odd = (kNeighbours ? row : col) % 2 != 0;
  const auto part_of = [](const Philox4& call, bool odd_lane) {
    if constexpr (kNeighbours)
      return DropoutBits::row_bytes(call, odd_lane);
    else
      return DropoutBits::col_values(call, odd_lane);
  };
  const auto give = [&](int block, const auto& part) {
    const int row_block = block / kColBlocks, col_block = block % kColBlocks;
    if constexpr (kNeighbours) {
      f(row_block, col_block, DropoutBits::row_values(part).word);
    } else {
      const uint32_t words[4] = {part.word[0], part.word[2], part.word[1], part.word[3]};
      f(col_block, row_block, words);
    }
  };
#pragma unroll
  for (int first = 0; first < kBlocks; first += 2 * kCalls) {
    // The group of this lane's call, in a block or in the next one.
    const auto group = [&](int group0, int call, auto&& place_of) {
      const int block = first + 2 * call, place = place_of(block);
      const int more = block + 1 < kBlocks ? place_of(block + 1) - place : 0;
      return group0 + (odd ? more * DropoutBits::kGroups : 0) + place * DropoutBits::kGroups;
    };
    Philox4 calls[kCalls];
    bits.calls(
        calls, [&](int call) { return group(row_group, call, [](int block) { return block / kColBlocks; }); },
        [&](int call) { return group(col_group, call, [](int block) { return block % kColBlocks; }); });
#pragma unroll
    for (int call = 0; call < kCalls; ++call) {
      const int block = first + 2 * call;
      const auto mine = part_of(calls[call], odd);
      if (block + 1 < kBlocks) {
        const auto other = exchange(part_of(calls[call], !odd));
        give(block, choose(odd, mine, other));
        give(block + 1, choose(odd, other, mine));
      } else if (block < kBlocks) {
        give(block, mine);
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
