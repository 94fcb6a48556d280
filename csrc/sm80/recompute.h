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

// S^T and dP^T: keys by rows, so that a warp has P^T and dS^T as left operands of dV and dK in its registers. The rows
// of a block are gone through kSubRows at a time.
template <class Config>
using ScoreWarps = WarpPlace<Config, Config::kKeys, Config::kSubRows, Config::kScoreKeyWarps, Config::kScoreRowWarps>;

// What a block of scores is computed from. `statistics` is an array of {lse, delta}, one of each row.
template <class T, class Config>
struct ScoreOperands {
  using Keys = SharedTile<T, Config::kKeys, Config::kDim>;
  using Rows = SharedTile<T, Config::kRows, Config::kDim>;

  Rows q, dout;
  Keys k, v;
  uint32_t statistics;
};

// Starts the copies of lse and delta of the rows of a block, of which the first `rows` exist.
template <class Config>
__device__ __forceinline__ void copy_statistics(uint32_t to, const BackwardProblem& p, int batch, int64_t row, int head,
                                                int rows) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= Config::kRows) return;
  const bool valid = i < rows;
  const int from = valid ? i : 0;
  copy_4_bytes(to + i * 8, stats_ptr<float>(p.lse, batch, row + from, head), valid);
  copy_4_bytes(to + i * 8 + 4, stats_ptr<float>(p.delta, batch, row + from, head), valid);
}

template <class T, class Config, bool kGeneral>
class Recompute {
  using Warps = ScoreWarps<Config>;
  using Operands = ScoreOperands<T, Config>;

 public:
  using Scores = cuda::TransposedAccumulator<Warps::N, Warps::M>;

  __device__ Recompute(const BackwardProblem& p, int batch, int head, const cuda::DeviceBand& band, Precision precision)
      : p_(p), band_(band), terms_(p, batch, head, band), precision_(precision) {}
  __device__ Recompute(const BackwardProblem& p, const cuda::ScoreConstants& constants, int batch, int head,
                       const cuda::DeviceBand& band, Precision precision)
      : p_(p), band_(band), terms_(p, constants, batch, head, band), precision_(precision) {}

  // Of the warp's part of the rows from sub_row on of the block whose first row and key are given: P after dropout, as
  // dV needs it, and dS, the gradient of scale * q.k. on_bias_gradient(m, half, n, e, x) gets the gradient of what is
  // added to the scores.
  template <class F>
  __device__ __forceinline__ void operator()(const Operands& operands, int first_row, int first_key, int sub_row,
                                             Scores& prob, Scores& ds, F&& on_bias_gradient) const {
    const Warps warp;
    const int tile_row = sub_row + warp.col, row = first_row + tile_row, key = first_key + warp.row;
    multiply_keys(operands.k, operands.q, tile_row, prob);
    multiply_keys(operands.v, operands.dout, tile_row, ds);
    [[maybe_unused]] Scores cap_gradient;
    if constexpr (kGeneral) cap_gradient.fill(1);
    apply_terms(prob, row, key, [&](int m, int half, int n, int e, float x) { cap_gradient.at(m, half, n, e) = x; });
    differentiate(operands.statistics, tile_row, row, key, prob, ds, [&](int m, int half, int n, int e) {
      if constexpr (kGeneral) {
        float& dx = ds.at(m, half, n, e);
        on_bias_gradient(m, half, n, e, dx);
        dx *= cap_gradient.at(m, half, n, e);
      }
    });
  }

  // The steps of that, for kernels with something to do between them, the last two for any 16 or more of the warp's
  // rows. `tile_row`: the first one in the block; `row`, `key`: the first ones in the sequence.

  // c^T = keys rows^T
  __device__ __forceinline__ void multiply_keys(const typename Operands::Keys& keys,
                                                const typename Operands::Rows& rows, int tile_row, Scores& c) const {
    c.fill(0);
    const StraightOperand<typename Operands::Keys, Side::left> left(keys, Warps().row);
    multiply_operands<Config::kDim / kStepDepth<T>>(
        c.transpose, left, StraightOperand<typename Operands::Rows, Side::right>(rows, tile_row), precision_);
  }

  // Products become scores, -inf where they are hidden. on_cap_gradient: see ScoreTerms::apply.
  template <class Part, class F>
  __device__ __forceinline__ void apply_terms(Part& s, int row, int key, F&& on_cap_gradient) const {
    if constexpr (kGeneral) terms_.apply(s, row, key, on_cap_gradient);
    const auto every = band_.every(row, min(row + Part::kRows, band_.seqlen_q));
    if (every.begin > key || every.end < key + Part::kCols) cuda::mask_band(s, band_, row, key);
  }

  // From scores and dP to P after dropout and the gradient of the scores; on_gradient(m, half, n, e) when both are
  // there.
  template <class Part, class F>
  __device__ __forceinline__ void differentiate(uint32_t statistics, int tile_row, int row, int key, Part& prob,
                                                Part& ds, F&& on_gradient) const {
    const float scale_log2 = static_cast<float>(p_.softmax_scale) * cuda::kLog2e;
    const auto finish = [&](int m, int half, int n, int e, float kept, float delta) {
      float &x = prob.at(m, half, n, e), &dx = ds.at(m, half, n, e);
      dx = x * (dx * kept - delta);
      x *= kept;
      on_gradient(m, half, n, e);
    };
    const bool drops = kGeneral && p_.dropout_p > 0;
    float deltas[Part::kRowPieces][2];
#pragma unroll
    for (int m = 0; m < Part::kRowPieces; ++m) {
      const uint4 of_rows = load_shared_16_bytes(statistics + (tile_row + prob.row(m, 0)) * 8);
      const float lses[2] = {__uint_as_float(of_rows.x), __uint_as_float(of_rows.z)};
      deltas[m][0] = __uint_as_float(of_rows.y), deltas[m][1] = __uint_as_float(of_rows.w);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float lse = finite_max(lses[half]);
#pragma unroll
        for (int n = 0; n < Part::kColPieces; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            // No probability exceeds 1; beside huge scores, whose rounding is larger than that of lse, the limit is
            // needed.
            float& x = prob.at(m, half, n, e);
            const float log2_p = kGeneral ? (x - lse) * cuda::kLog2e : fmaf(x, scale_log2, -lse * cuda::kLog2e);
            x = cuda::exp2_approx(fminf(log2_p, 0.0f));
            if (!drops) finish(m, half, n, e, 1.0f, deltas[m][half]);
          }
      }
    }
    if (drops) {
      const float scale = static_cast<float>(dropout_scale(p_.dropout_p));
      terms_.dropout(prob, row, key, [&](int m, int half, int n, int e, bool kept) {
        finish(m, half, n, e, kept ? scale : 0.0f, deltas[m][half]);
      });
    }
  }

 private:
  const BackwardProblem& p_;
  const cuda::DeviceBand& band_;
  const cuda::ScoreTerms<T> terms_;
  const Precision precision_;
};

}  // namespace fae::sm80
