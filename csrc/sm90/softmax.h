#pragma once

#include "../cuda/online_softmax.h"
#include "../sm80/ptx.h"

// Online softmax with a stale maximum. P and l may be in units of any m that is not far below the maximum: a block of
// keys that all rows see whole keeps the m it finds, which saves the search for its maximum. Where P grows too large,
// the warp does the block again with its maximum.

namespace fae::sm90 {

using cuda::Accumulator;
using cuda::RowStates;

// How far the sum over a block may grow before m follows. P stays finite in float16, and O in float.
constexpr float kMaxStaleSum = 1 << 15;
// Beyond, the rounding of m is more than one binary digit of P: the fused multiply-add has to go.
constexpr float kLargeScore = 1 << 24;

struct RowFlags {
  bool x[2] = {false, false};
};

// What accumulated rows are to be multiplied by.
struct RowFactors {
  float x[2] = {1, 1};

  __device__ __forceinline__ bool any_moved() const { return __any_sync(0xffffffffu, x[0] != 1.0f || x[1] != 1.0f); }
};

template <int N>
__device__ __forceinline__ void rescale(Accumulator<1, N>& o, const RowFactors& factors) {
  o.for_each([&](int m, int half, int n, int e) { o.at(m, half, n, e) *= factors.x[half]; });
}

// Scores become P = exp(s - m), where m has followed the block's maximum in all rows but those that `keep` theirs.
// Results of a row depend on that row alone.
template <bool kGeneral, int N>
__device__ __forceinline__ RowFactors follow_maximum(RowStates<1, kGeneral>& states, Accumulator<1, N>& s,
                                                     float scale_log2, const RowFlags& keep) {
  RowFactors factors;
  float scale[2] = {scale_log2, scale_log2};
  bool large = false;
  s.for_each_row([&](int m, int half) {
    float x = s.at(m, half, 0, 0);
#pragma unroll
    for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(s.at(m, half, n, 0), s.at(m, half, n, 1)));
    x = cuda::quad_max(x);
    if (keep.x[half]) x = minus_infinity<float>();
    factors.x[half] = states.x[m][half].update_max(kGeneral ? x : x * scale_log2);
    large |= fabsf(finite_max(states.x[m][half].m)) > kLargeScore;
  });
  if (!kGeneral && __any_sync(0xffffffffu, large))
    s.for_each_row([&](int m, int half) {
      if (fabsf(finite_max(states.x[m][half].m)) <= kLargeScore) return;
      scale[half] = 1;
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
        x = sm80::exp2_approx(kGeneral ? (x - reference) * cuda::kLog2e : fmaf(x, scale[half], -reference));
        sum += x;
      }
    states.x[m][half].l += sum;
  });
  return factors;
}

// The same with the m that is there. Where that is too low for some row of the warp, `states` stay as they were, and
// redo(keep) has to do the block with follow_maximum, for which it needs the scores anew. Whether it had to.
template <int N, class Redo>
__device__ __forceinline__ bool keep_maximum(RowStates<1, false>& states, Accumulator<1, N>& s, float scale_log2,
                                             Redo&& redo) {
  float sums[2];
  s.for_each_row([&](int m, int half) {
    const float reference = states.x[m][half].m;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s.at(m, half, n, e);
        x = sm80::exp2_approx(fmaf(x, scale_log2, -reference));
        sum += x;
      }
    sums[half] = sum;
  });
  const auto is_fine = [&](int half) {  // NaN is not
    return (sums[half] < kMaxStaleSum) & (fabsf(states.x[0][half].m) <= kLargeScore);
  };
  if (__any_sync(0xffffffffu, !(is_fine(0) & is_fine(1)))) {
    const auto fine_in_quad = [&](int half) { return cuda::quad_max(is_fine(half) ? 0.0f : 1.0f) == 0.0f; };
    redo(RowFlags{fine_in_quad(0), fine_in_quad(1)});
    return true;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) states.x[0][half].l += sums[half];
  return false;
}

}  // namespace fae::sm90
