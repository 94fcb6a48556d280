#pragma once

#include <type_traits>

#include "../core/softmax.h"
#include "accumulator.h"

// Online softmax of the rows of one warp. Lanes of a quad share a row: each keeps the whole row's maximum and the sum
// over its own columns, which are added up at the end.

namespace fae::cuda {

// Plain scores are products times a scale. They are counted in powers of two, so that scale and maximum take one fused
// multiply-add. General scores can be as low as the lowest float, and stay in the natural units that they come in.
template <int M, bool kGeneral>
struct RowStates {
  RowState<float, float, std::conditional_t<kGeneral, NaturalBase, BinaryBase>> x[M][2];
  bool settled = false;  // the warp's rows all have a maximum that exponentiate_settled can work with
};

// The fused multiply-add brings to light how m was rounded. Up to here that is less than one binary digit of P, which
// cancels; beyond it, scores are rounded in the way of m, so that the largest gives P = 1 whatever its size.
constexpr float kLargeScore = 1 << 24;

// Scores become P = exp(s - m), and what has been accumulated in `o` follows the maximum. scale_log2: of plain scores.
template <bool kGeneral, int M, int N, int ND, class Exp2>
__device__ __forceinline__ void update_softmax(RowStates<M, kGeneral>& states, Accumulator<M, N>& s,
                                               Accumulator<M, ND>& o, float scale_log2, Exp2&& exp2) {
  float factors[M][2];
  bool moved = false, large = false, settled = true;
  s.for_each_row([&](int m, int half) {
    float x = s.at(m, half, 0, 0);
#pragma unroll
    for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(s.at(m, half, n, 0), s.at(m, half, n, 1)));
    x = quad_max(x);
    factors[m][half] = states.x[m][half].update_max(kGeneral ? x : x * scale_log2);
    moved |= factors[m][half] != 1.0f;
    large |= fabsf(finite_max(states.x[m][half].m)) > kLargeScore;
    settled &= fabsf(states.x[m][half].m) <= kLargeScore;
  });
  if (__any_sync(0xffffffffu, moved))
    o.for_each([&](int m, int half, int n, int e) { o.at(m, half, n, e) *= factors[m][half]; });
  if constexpr (!kGeneral) {
    states.settled = __all_sync(0xffffffffu, settled);
    if (!states.settled && __any_sync(0xffffffffu, large)) {
      s.for_each([&](int m, int half, int n, int e) { s.at(m, half, n, e) *= scale_log2; });
      scale_log2 = 1;
    }
  }
  s.for_each_row([&](int m, int half) {
    const float reference = finite_max(states.x[m][half].m);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(m, half, n, e);
        x = exp2(kGeneral ? (x - reference) * kLog2e : fmaf(x, scale_log2, -reference));
        sum += x;
      }
    states.x[m][half].l += sum;
  });
}

// Plain scores become P = exp(s - m) with the maxima of earlier blocks, whether or not there is a larger one here: any
// m up to the true maximum gives the same result, as long as no P or sum of them leaves the range of its type. Where a
// sum reaches `limit` the answer is false, the scores are lost and the states are as before.
template <int M, int N, class Exp2>
__device__ __forceinline__ bool exponentiate_settled(RowStates<M, false>& states, Accumulator<M, N>& s,
                                                     float scale_log2, float limit, Exp2&& exp2) {
  float sums[M][2];
  bool small = true;
  s.for_each_row([&](int m, int half) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(m, half, n, e);
        x = exp2(fmaf(x, scale_log2, -states.x[m][half].m));
        sum += x;
      }
    sums[m][half] = sum;
    small &= sum < (states.settled ? limit : 0.0f);
  });
  if (!__all_sync(0xffffffffu, small)) return false;
  s.for_each_row([&](int m, int half) { states.x[m][half].l += sums[m][half]; });
  return true;
}

}  // namespace fae::cuda
