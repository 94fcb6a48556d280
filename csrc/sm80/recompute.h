#pragma once

#include "../cuda/score_terms.h"
#include "config.h"

// The part of the backward pass that every gradient needs: P and dS of a block of rows and keys, recomputed from Q, K,
// V, dO and the row statistics, all in shared memory.

namespace fae::sm80 {

// A warp's place in the grid of warps of a product with kRows x kCols results: M x N pieces from (row, col) on.
template <class Config, int kRows, int kCols, int kRowWarps, int kColWarps>
struct WarpPlace {
  static constexpr int M = kRows / kRowWarps / 16, N = kCols / kColWarps / 8;
  static_assert(M * kRowWarps * 16 == kRows && N * kColWarps * 8 == kCols && N % 2 == 0);

  const int row = warp_index() / kColWarps * M * 16, col = warp_index() % kColWarps * N * 8;
  // Whether there is one for this warp.
  __device__ static bool exists() {
    return kRowWarps * kColWarps == Config::kWarps || warp_index() < kRowWarps * kColWarps;
  }
};

template <class Config>
using ScoreWarps = WarpPlace<Config, Config::kRows, Config::kKeys, Config::kScoreRowWarps, Config::kScoreColWarps>;

// What a block of scores is computed from, the statistics as arrays of kRows floats.
template <class T, class Config>
struct ScoreOperands {
  using Keys = SharedTile<T, Config::kKeys, Config::kDim>;
  using Rows = SharedTile<T, Config::kRows, Config::kDim>;

  Rows q, dout;
  Keys k, v;
  uint32_t lse, delta;
};

template <class T, class Config, bool kGeneral>
class Recompute {
  using Warps = ScoreWarps<Config>;
  using Operands = ScoreOperands<T, Config>;

 public:
  using Scores = Accumulator<Warps::M, Warps::N>;

  __device__ Recompute(const BackwardProblem& p, int batch, int head, const cuda::DeviceBand& band, Precision precision)
      : p_(p), band_(band), terms_(p, batch, head, band), precision_(precision) {}

  // Of the warp's part of the block whose first row and key are given: P after dropout, as dV needs it, and dS, the
  // gradient of scale * q.k. on_bias_gradient(m, half, n, e, x) gets the gradient of what is added to the scores.
  template <class F>
  __device__ __forceinline__ void operator()(const Operands& operands, int first_row, int first_key, Scores& prob,
                                             Scores& ds, F&& on_bias_gradient) const {
    const Warps warp;
    const int row = first_row + warp.row, key = first_key + warp.col;
    multiply_rows(operands.q, operands.k, warp, prob);
    multiply_rows(operands.dout, operands.v, warp, ds);

    const float scale_log2 = static_cast<float>(p_.softmax_scale) * cuda::kLog2e;
    [[maybe_unused]] Scores cap_gradient;
    if constexpr (kGeneral) {
      cap_gradient.fill(1);
      terms_.apply(prob, row, key, [&](int m, int half, int n, int e, float x) { cap_gradient.at(m, half, n, e) = x; });
    }
    const auto every = band_.every(row, min(row + Warps::M * 16, band_.seqlen_q));
    if (every.begin > key || every.end < key + Warps::N * 8) cuda::mask_band(prob, band_, row, key);

    float delta[Warps::M][2];
    prob.for_each_row([&](int m, int half) {
      const int offset = (warp.row + prob.row(m, half)) * 4;
      const float lse = finite_max(__uint_as_float(load_shared(operands.lse + offset)));
      delta[m][half] = __uint_as_float(load_shared(operands.delta + offset));
#pragma unroll
      for (int n = 0; n < Warps::N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          // No probability exceeds 1; beside huge scores, whose rounding is larger than that of lse, the limit is
          // needed.
          float& x = prob.at(m, half, n, e);
          const float log2_p = kGeneral ? (x - lse) * cuda::kLog2e : fmaf(x, scale_log2, -lse * cuda::kLog2e);
          x = exp2_approx(fminf(log2_p, 0.0f));
        }
    });

    const auto finish = [&](int m, int half, int n, int e, float kept) {
      float &x = prob.at(m, half, n, e), &dx = ds.at(m, half, n, e);
      dx = x * (dx * kept - delta[m][half]);
      x *= kept;
      if constexpr (kGeneral) {
        on_bias_gradient(m, half, n, e, dx);
        dx *= cap_gradient.at(m, half, n, e);
      }
    };
    if (kGeneral && p_.dropout_p > 0) {
      const float scale = static_cast<float>(dropout_scale(p_.dropout_p));
      terms_.dropout(prob, row, key,
                     [&](int m, int half, int n, int e, bool kept) { finish(m, half, n, e, kept ? scale : 0.0f); });
    } else {
      prob.for_each([&](int m, int half, int n, int e) { finish(m, half, n, e, 1.0f); });
    }
  }

 private:
  // c = rows keys^T
  __device__ __forceinline__ void multiply_rows(const typename Operands::Rows& rows,
                                                const typename Operands::Keys& keys, const Warps& warp,
                                                Scores& c) const {
    c.fill(0);
    const StraightOperand<typename Operands::Rows, Side::left> left(rows, warp.row);
    multiply<Config::kDim / kStepDepth<T>>(
        c, [&](int m, int k) { return left.left(m, k); },
        StraightOperand<typename Operands::Keys, Side::right>(keys, warp.col), precision_);
  }

  const BackwardProblem& p_;
  const cuda::DeviceBand& band_;
  const cuda::ScoreTerms terms_;
  const Precision precision_;
};

}  // namespace fae::sm80
