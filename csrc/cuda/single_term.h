#pragma once

#include "score_terms.h"

// Scores with one term only, in the few instructions that go beside matrix products without delaying them much: for
// kernels made for that term. Scores become powers of two, as exp2 takes them.

namespace fae::cuda {

// ALiBi. distance: i + shift - j where the accumulator begins.
template <class Scores>
__device__ __forceinline__ void add_alibi(Scores& s, float scale_log2, float slope_log2, int distance) {
  const int row = s.row(0, 0), col = s.col(0, 0);
  const float first = static_cast<float>(distance + row - col);
  const auto more = [&](int m, int half, int n, int e) {  // the same for all lanes
    return static_cast<float>((s.row(m, half) - row) - (s.col(n, e) - col));
  };
  const bool below = distance - (Scores::kCols - 1) >= 0, above = distance + Scores::kRows - 1 <= 0;
  if (below || above) {  // of the diagonal, distances grow and shrink evenly
    const float slope = below ? slope_log2 : -slope_log2, bias = -slope * first;
    s.for_each([&](int m, int half, int n, int e) {
      s.at(m, half, n, e) = fmaf(s.at(m, half, n, e), scale_log2, fmaf(-slope, more(m, half, n, e), bias));
    });
  } else {
    s.for_each([&](int m, int half, int n, int e) {
      s.at(m, half, n, e) = fmaf(s.at(m, half, n, e), scale_log2, -slope_log2 * fabsf(first + more(m, half, n, e)));
    });
  }
}

// Softcap: cap tanh(scale s / cap), a series where the product is well below the cap. Which of the two an element takes
// depends on nothing else, so that neighbours don't show in its bits.
__device__ __forceinline__ float sum_series(const SoftcapSeries& series, float x) {
  const float square = x * x;
  float sum = series.factors[series.kTerms - 1];
#pragma unroll
  for (int i = series.kTerms - 2; i >= 0; --i) sum = fmaf(sum, square, series.factors[i]);
  return rounded_product(x, sum);  // the same bits wherever it is taken
}

// Whether no product of the warp needs more than the series.
template <class Scores>
__device__ __forceinline__ bool series_suffices(const Scores& s, const SoftcapSeries& series) {
  float largest[4] = {};  // one alone would be a long chain
  s.for_each([&](int m, int half, int n, int e) {
    float& x = largest[2 * half + e];
    x = fmaxf(x, fabsf(s.at(m, half, n, e)));
  });
  const bool small = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])) <= series.limit;
  return __all_sync(0xffffffffu, small);
}

template <class T, class Scores>
__device__ __forceinline__ void cap_scores(Scores& s, const ScoreConstants& constants) {
  const SoftcapSeries& series = constants.softcap_series;
  if (series_suffices(s, series)) {
    s.for_each([&](int m, int half, int n, int e) { s.at(m, half, n, e) = sum_series(series, s.at(m, half, n, e)); });
  } else {
    const float cap_log2 = constants.softcap * kLog2e;
    s.for_each([&](int m, int half, int n, int e) {
      float& x = s.at(m, half, n, e);
      if (fabsf(x) <= series.limit)
        x = sum_series(series, x);
      else
        x = cap_log2 * score_tanh<T>(x * constants.scale_softcap);
    });
  }
}

}  // namespace fae::cuda
