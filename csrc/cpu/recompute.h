#pragma once

#include "gemm.h"
#include "pack.h"
#include "scores.h"

// The part of the backward pass that every gradient needs: P and dS of a block, recomputed from Q, K, V, dO and the
// row statistics.

namespace fae::cpu::FAE_LEVEL {

// Packed operands of one block: `q` and `dout` are rows, `k_transposed` (carrying the scale) and `v_transposed` panels
// of kBlockKeys columns.
template <class T>
struct BlockOperands {
  const T *q, *dout, *k_transposed, *v_transposed;
};

template <class T>
class Recompute {
 public:
  Recompute(const BackwardProblem& p, int64_t batch, int64_t head)
      : p_(p),
        batch_(batch),
        head_(head),
        sequence_(sequence_of(p, batch)),
        band_(band_of(p, sequence_)),
        terms_(p, batch, head, sequence_) {}

  const Sequence& sequence() const { return sequence_; }
  const Band& band() const { return band_; }

  //   P = exp(S - lse),  dS = P (dP - delta)
  // of the rows [row, row + rows), at most kStripRows, against the key block at `key`; zeros where a row does not see a
  // key. `prob` holds P after dropout, as dV needs it. With `cap_gradient` (memory like prob) dS goes on through the
  // softcap, to the gradient of scale * q.k; without it stops at the sum of bias and capped score.
  void operator()(const BlockOperands<T>& operands, int64_t row, int64_t rows, int64_t key, T* prob, T* ds,
                  T* cap_gradient) const {
    product(operands.q, operands.k_transposed, p_.head_dim, row, rows, key, prob);
    product(operands.dout, operands.v_transposed, p_.head_dim_v, row, rows, key, ds);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Group g = group(row + i, rows - i, key);
      const int64_t at = i * kBlockKeys;
      finish(g, key, prob + at, ds + at, cap_gradient && p_.softcap != 0 ? cap_gradient + at : nullptr);
    }
  }

 private:
  static constexpr int W = Vec<T>::width;

  // Up to kTileRows rows and the columns that any of them sees, in whole vectors.
  struct Group {
    int64_t row, rows, col_begin, col_end;
    bool whole;  // every row sees every column
  };
  Group group(int64_t row, int64_t rows_left, int64_t key) const {
    const int64_t rows = rows_left < kTileRows ? rows_left : kTileRows;
    const Interval any = band_.any(row, row + rows), every = band_.every(row, row + rows);
    const int64_t first = any.begin > key ? any.begin - key : 0;
    const int64_t last = any.end - key < kBlockKeys ? any.end - key : kBlockKeys;
    if (first >= last) return {row, rows, 0, 0, false};
    const bool whole = every.begin <= key && every.end >= key + kBlockKeys;
    return {row, rows, first / W * W, (last + W - 1) / W * W, whole};
  }

  // All rows past one panel, which so stays in the first-level cache.
  void product(const T* a, const T* panel, int64_t depth, int64_t row, int64_t rows, int64_t key, T* c) const {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Group g = group(row + i, rows - i, key);
      gemm<T>({.a = a + i * padded<T>(depth),
               .a_row = padded<T>(depth),
               .b = panel + g.col_begin,
               .ldb = kBlockKeys,
               .c = c + i * kBlockKeys + g.col_begin,
               .ldc = kBlockKeys,
               .rows = g.rows,
               .cols = g.col_end - g.col_begin,
               .depth = depth});
    }
  }

  // Scores and dP of a group become P and dS.
  void finish(const Group& g, int64_t key, T* prob, T* ds, T* cap_gradient) const {
    if (terms_.any()) terms_.apply(prob, g.row, g.rows, key, g.col_begin, g.col_end, cap_gradient);
    for (int64_t i = 0; i < g.rows; ++i, prob += kBlockKeys, ds += kBlockKeys) {
      if (!g.whole) {
        mask_band(prob, band_, g.row + i, key, g.col_begin, g.col_end);
        for (T* x : {prob, ds}) {
          for (int64_t j = 0; j < g.col_begin; ++j) x[j] = 0;
          for (int64_t j = g.col_end; j < kBlockKeys; ++j) x[j] = 0;
        }
      }
      finish_row(g.row + i, key, g.col_begin, g.col_end, prob, ds,
                 cap_gradient ? cap_gradient + i * kBlockKeys : nullptr);
    }
  }

  FAE_INLINE void finish_row(int64_t row, int64_t key, int64_t col_begin, int64_t col_end, T* prob, T* ds,
                             const T* cap_gradient) const {
    const Vec<T> lse = finite_max(*stats_ptr<T>(p_.lse, batch_, sequence_.q_start + row, head_));
    const Vec<T> delta = *stats_ptr<T>(p_.delta, batch_, sequence_.q_start + row, head_);
    T factors[kBlockKeys];
    if (terms_.dropout()) terms_.dropout_factors(row, key, col_begin, col_end, factors);
    for (int64_t j = col_begin; j < col_end; j += W) {
      // No probability exceeds 1; beside huge scores, whose rounding is larger than that of lse, the limit is needed.
      const Vec<T> p = exp_of(min(Vec<T>(T(0)), Vec<T>::load(prob + j) - lse));
      Vec<T> kept = p, dp = Vec<T>::load(ds + j);
      if (terms_.dropout()) {
        kept *= Vec<T>::load(factors + j);
        dp *= Vec<T>::load(factors + j);
      }
      Vec<T> gradient = p * (dp - delta);
      if (cap_gradient) gradient *= Vec<T>::load(cap_gradient + j);
      kept.store(prob + j);
      gradient.store(ds + j);
    }
  }

  const BackwardProblem& p_;
  const int64_t batch_, head_;
  const Sequence sequence_;
  const Band band_;
  const ScoreTerms<T> terms_;
};

}  // namespace fae::cpu::FAE_LEVEL
