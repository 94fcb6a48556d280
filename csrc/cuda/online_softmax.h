#pragma once

#include <type_traits>

#include "../core/softmax.h"
#include "accumulator.h"
#include "approx.h"

// Online softmax of the rows of one warp. Lanes of a quad share a row: each keeps the whole row's maximum and the sum
// over its own columns, which are added up at the end. What becomes of a row depends on that row alone.
//
// P and l may be in units of any m that is not above the maximum: a block of keys that all rows see whole keeps the m
// it finds, which saves the search for its maximum. Where P grows too large, the warp does the block again with its
// maximum.

namespace fae::cuda {

// Scores are counted in powers of two, so that a scale and the maximum take one fused multiply-add. General scores can
// be as low as the lowest float, and stay in the natural units that they come in.
template <int M, bool kGeneral>
struct RowStates {
  RowState<float, float, std::conditional_t<kGeneral, NaturalBase, BinaryBase>> x[M][2];
};

// How far the sum over a block may grow before m follows. P stays finite in float16, and O in float.
constexpr float kMaxStaleSum = 1 << 15;
// The fused multiply-add brings to light how m was rounded. Up to here that is less than one binary digit of P, which
// cancels; beyond it, scores are rounded in the way of m, so that the largest gives P = 1 whatever its size.
constexpr float kLargeScore = 1 << 24;

template <int M>
struct RowFlags {
  bool x[M][2] = {};
};

// What accumulated rows are to be multiplied by.
template <int M>
struct RowFactors {
  float x[M][2];

  __device__ __forceinline__ RowFactors() {
#pragma unroll
    for (int m = 0; m < M; ++m) x[m][0] = x[m][1] = 1;
  }
  __device__ __forceinline__ bool any_moved() const {
    bool moved = false;
#pragma unroll
    for (int m = 0; m < M; ++m) moved |= x[m][0] != 1.0f || x[m][1] != 1.0f;
    return __any_sync(0xffffffffu, moved);
  }
};

template <int M, int N>
__device__ __forceinline__ void rescale(Accumulator<M, N>& o, const RowFactors<M>& factors) {
  o.for_each([&](int m, int half, int n, int e) { o.at(m, half, n, e) *= factors.x[m][half]; });
}

// Scores become P = exp(s - m), where m has followed the block's maximum in all rows but those that `keep` theirs.
template <bool kGeneral, int M, int N>
__device__ __forceinline__ RowFactors<M> follow_maximum(RowStates<M, kGeneral>& states, Accumulator<M, N>& s,
                                                        float scale_log2, const RowFlags<M>& keep) {
  RowFactors<M> factors;
  float scale[M][2];
  bool large = false;
  s.for_each_row([&](int m, int half) {
    float x = s.at(m, half, 0, 0);
#pragma unroll
    for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(s.at(m, half, n, 0), s.at(m, half, n, 1)));
    x = quad_max(x);
    if (keep.x[m][half]) x = minus_infinity<float>();
    factors.x[m][half] = states.x[m][half].update_max(kGeneral ? x : x * scale_log2);
    scale[m][half] = scale_log2;
    large |= fabsf(finite_max(states.x[m][half].m)) > kLargeScore;
  });
  if (!kGeneral && __any_sync(0xffffffffu, large))
    s.for_each_row([&](int m, int half) {
      if (fabsf(finite_max(states.x[m][half].m)) <= kLargeScore) return;
      scale[m][half] = 1;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) s.at(m, half, n, e) *= scale_log2;
    });
  s.for_each_row([&](int m, int half) {
    const float reference = finite_max(states.x[m][half].m);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(m, half, n, e);
        x = exp2_approx(kGeneral ? (x - reference) * kLog2e : fmaf(x, scale[m][half], -reference));
        sum += x;
      }
    states.x[m][half].l += sum;
  });
  return factors;
}

// The same with the m that is there. difference(x, m, ...) of an accumulated x, and of where it is, as at() takes that,
// is its score less m, in powers of two. Where m is too low for some row of the warp, `states` stay as they were, and
// redo(keep) has to do the block with follow_maximum, for which it needs the scores anew. Whether it had to.
template <bool kGeneral, int M, int N, class Difference, class Redo>
__device__ __forceinline__ bool keep_maximum(RowStates<M, kGeneral>& states, Accumulator<M, N>& s,
                                             Difference&& difference, Redo&& redo) {
  float sums[M][2];
  s.for_each_row([&](int m, int half) {
    const float reference = states.x[m][half].m;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(m, half, n, e);
        x = exp2_approx(difference(x, reference, m, half, n, e));
        sum += x;
      }
    sums[m][half] = sum;
  });
  const auto is_fine = [&](int m, int half) {  // NaN is not
    return (sums[m][half] < kMaxStaleSum) & (kGeneral || fabsf(states.x[m][half].m) <= kLargeScore);
  };
  bool fine = true;
  s.for_each_row([&](int m, int half) { fine &= is_fine(m, half); });
  if (!__all_sync(0xffffffffu, fine)) {
    RowFlags<M> keep;
    s.for_each_row([&](int m, int half) { keep.x[m][half] = quad_max(is_fine(m, half) ? 0.0f : 1.0f) == 0.0f; });
    redo(keep);
    return true;
  }
  s.for_each_row([&](int m, int half) { states.x[m][half].l += sums[m][half]; });
  return false;
}

}  // namespace fae::cuda
