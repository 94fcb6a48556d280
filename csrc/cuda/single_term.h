#pragma once

#include "score_terms.h"

// Scores with one term only, in the few instructions that go beside matrix products without delaying them much: for
// kernels made for that term. Scores become powers of two, as exp2 takes them.

namespace fae::cuda {

// ALiBi on an accumulator. distance: i + shift - j where that begins.
template <class Scores>
class Alibi {
 public:
  __device__ __forceinline__ Alibi(const Scores& s, float slope_log2, int distance)
      : row_(s.row(0, 0)),
        col_(s.col(0, 0)),
        slope_(slope_log2),
        first_(static_cast<float>(distance + row_ - col_)),
        below_(distance - (Scores::kCols - 1) >= 0),
        above_(distance + Scores::kRows - 1 <= 0) {}

  // `start` and what is added to an element, if all are below the diagonal.
  __device__ __forceinline__ float below(const Scores& s, float start, int m, int half, int n, int e) const {
    return even(slope_, s, start, m, half, n, e);
  }
  __device__ __forceinline__ void add(Scores& s, float scale_log2) const {
    const auto add_all = [&](auto&& term) {
      s.for_each([&](int m, int half, int n, int e) {
        s.at(m, half, n, e) = fmaf(s.at(m, half, n, e), scale_log2, term(m, half, n, e));
      });
    };
    if (below_ || above_) {
      const float slope = below_ ? slope_ : -slope_;
      add_all([&](int m, int half, int n, int e) { return even(slope, s, 0, m, half, n, e); });
    } else {
      add_all([&](int m, int half, int n, int e) { return -slope_ * fabsf(first_ + more(s, m, half, n, e)); });
    }
  }

 private:
  // On one side of the diagonal, distances grow or shrink evenly.
  __device__ __forceinline__ float even(float slope, const Scores& s, float start, int m, int half, int n,
                                        int e) const {
    return fmaf(-slope, more(s, m, half, n, e), fmaf(-slope, first_, start));
  }
  // The same for all lanes.
  __device__ __forceinline__ float more(const Scores& s, int m, int half, int n, int e) const {
    return static_cast<float>((s.row(m, half) - row_) - (s.col(n, e) - col_));
  }

  const int row_, col_;
  const float slope_, first_;
  const bool below_, above_;
};

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

// What is well below the cap, and what is not.
template <class T, class Scores>
__device__ __forceinline__ void cap_mixed_scores(Scores& s, const ScoreConstants& constants) {
  const SoftcapSeries& series = constants.softcap_series;
  const float cap_log2 = constants.softcap * kLog2e;
  s.for_each([&](int m, int half, int n, int e) {
    float& x = s.at(m, half, n, e);
    if (fabsf(x) <= series.limit)
      x = sum_series(series, x);
    else
      x = cap_log2 * score_tanh<T>(x * constants.scale_softcap);
  });
}

template <class T, class Scores>
__device__ __forceinline__ void cap_scores(Scores& s, const ScoreConstants& constants) {
  const SoftcapSeries& series = constants.softcap_series;
  if (series_suffices(s, series))
    s.for_each([&](int m, int half, int n, int e) { s.at(m, half, n, e) = sum_series(series, s.at(m, half, n, e)); });
  else
    cap_mixed_scores<T>(s, constants);
}

}  // namespace fae::cuda
