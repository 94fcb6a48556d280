#pragma once

#include "backward_memory.h"

// P and dS where scores are more than products times a positive scale:
//   score = terms(S),  P = exp(score - lse),  dS = P (D dP - delta) d score / d (scale S),
// where D is what dropout multiplies a probability by, 0 or 1 / (1 - p). Of 16 rows at a time ("part"), as many as a
// call of the random generator covers: there are no registers for more.

namespace fae::sm90 {

// Of a warp's keys and the rows of a step.
template <class T>
class GeneralScores {
  using Part = cuda::PlacedAccumulator<2, 1>;

 public:
  // row, key: where the scores begin. statistics: of the first row.
  __device__ __forceinline__ GeneralScores(const BackwardCall& call, const KeyBlock& keys, int head, bool is_edge,
                                           int row, int key, uint32_t statistics)
      : terms_(call.p, call.constants, keys.batch, head, keys.band),
        constants_(call.constants),
        band_(keys.band),
        is_edge_(is_edge),
        row_(row),
        key_(key),
        statistics_(statistics) {}

  // Takes part k of S, and leaves there P d score / d (scale S), negative where dropout drops the element. Returns D P,
  // as left operand of dV.
  template <class Scores>
  __device__ __forceinline__ sm80::FragmentA<T> compute(Scores& scores, int k) const {
    const int row = row_ + 16 * k;
    Part prob, factor;
    prob.lane = opaque(lane_index());
    float lse[2][2];
    Part::for_each_row([&](int m, int half) { lse[m][half] = statistic(statistics_, 16 * k + prob.row(m, half), 0); });
    Part::for_each([&](int m, int half, int n, int e) { prob.at(m, half, n, e) = scores.at(2 * k + m, half, n, e); });
    factor.fill(1);
    terms_.apply(prob, row, key_,
                 [&](int m, int half, int n, int e, float derivative) { factor.at(m, half, n, e) = derivative; });
    if (is_edge_) cuda::mask_band(prob, band_, row, key_);
    Part::for_each([&](int m, int half, int n, int e) {
      float& x = prob.at(m, half, n, e);
      x = cuda::exp2_approx(fminf(fmaf(x, cuda::kLog2e, -lse[m][half]), 0.0f));
      factor.at(m, half, n, e) *= x;
    });
    if (constants_.drops())
      terms_.dropout(prob, row, key_, [&](int m, int half, int n, int e, bool kept) {
        prob.at(m, half, n, e) *= kept ? constants_.kept_weight : 0.0f;
        if (!kept) factor.at(m, half, n, e) *= -1.0f;
      });
    Part::for_each([&](int m, int half, int n, int e) { scores.at(2 * k + m, half, n, e) = factor.at(m, half, n, e); });
    return sm80::as_left_operand<T>(prob.transpose, 0, 0);
  }

  // Part k of dS, from dP and what `compute` has left in the place of S. on_gradient(part) sees it.
  template <class Scores, class F>
  __device__ __forceinline__ static sm80::FragmentA<T> finish(const Scores& dprob, const Scores& factors, int k,
                                                              const cuda::ScoreConstants& constants,
                                                              uint32_t statistics, F&& on_gradient) {
    Part ds;
    ds.lane = opaque(lane_index());
    Part::for_each([&](int m, int half, int n, int e) { ds.at(m, half, n, e) = dprob.at(2 * k + m, half, n, e); });
    if (constants.drops())
      Part::for_each([&](int m, int half, int n, int e) {
        float& x = ds.at(m, half, n, e);
        const bool kept = __float_as_uint(factors.at(2 * k + m, half, n, e)) >> 31 == 0;
        x = kept ? x * constants.kept_weight : 0.0f;
      });
    Part::for_each_row([&](int m, int half) {
      const float delta = statistic(statistics, 16 * k + ds.row(m, half), 1);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = ds.at(m, half, 0, e);
        x = fabsf(factors.at(2 * k + m, half, 0, e)) * (x - delta);
      }
    });
    on_gradient(ds);
    return sm80::as_left_operand<T>(ds.transpose, 0, 0);
  }

 private:
  // lse (number 0) or delta (1) of a row.
  __device__ __forceinline__ static float statistic(uint32_t statistics, int row, int number) {
    return __uint_as_float(sm80::load_shared(statistics + 16 * row + 4 * number));
  }

  const cuda::ScoreTerms<T> terms_;
  const cuda::ScoreConstants& constants_;
  const cuda::DeviceBand& band_;
  const bool is_edge_;
  const int row_, key_;
  const uint32_t statistics_;
};

// Writes part of a step's dS that begins at (row, key) of the step as gradient of the bias.
template <class T, class Config, class Part>
__device__ __forceinline__ void write_dbias(const BackwardCall& call, const BackwardMemory<T, Config>& memory,
                                            unsigned number, int row, int key, const Part& ds) {
  const Step step = read_struct<Step>(memory.step(number));
  const KeyBlock keys = read_struct<KeyBlock>(memory.key_block());
  Part::for_each([&](int m, int half, int n, int e) {
    cuda::write_bias_gradient<T>(call.p.dbias, keys.band, keys.batch, step.head, step.row_begin + row + ds.row(m, half),
                                 keys.key_begin + key + ds.col(n, e), ds.at(m, half, n, e));
  });
}

}  // namespace fae::sm90
