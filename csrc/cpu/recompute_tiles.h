#pragma once

#include "../core/band.h"
#include "pack_tiles.h"
#include "scores.h"

// The part of the backward pass on tiles that every gradient needs: P and dS of a block of 32 keys by 32 queries,
// recomputed from Q, K, V, dO and the row statistics. Blocks are transposed, rows are keys and columns queries, so that
// lse and delta are vectors that serve every row and P and dS come out as the left operands of dV and dK.

namespace fae::cpu::FAE_LEVEL {

constexpr int64_t kBlock = kTileDepth;
constexpr int64_t kBlockElements = kBlock * kBlock;

// 32 query rows of a head: right tiles of Q^T and dO^T, and statistics, where a row beyond the sequence has lse = inf
// and delta = 0 and so P = dS = 0.
struct QueryBlock {
  int64_t row, rows;
  const bfloat16 *q, *dout;
  const float *lse, *delta;
};

// 32 keys: left tiles of K and V.
struct KeyBlock {
  int64_t key;
  const bfloat16 *k, *v;
};

// Where P (after dropout) and dS go: P and dS as left tiles, dS also as right tiles with keys along the depth.
struct BlockResult {
  bfloat16 *prob, *ds, *ds_right;
};

struct BlockScratch {
  float *s, *dp;                           // [kBlock keys][kBlock queries]
  float *dropout_factors, *cap_gradients;  // the same; ones where a call has no dropout or softcap
  float *rows, *row_gradients;             // [kBlock queries][kBlockKeys], the layout of ScoreTerms

  explicit BlockScratch(Arena& arena)
      : s(arena.take<float>(kBlockElements)),
        dp(arena.take<float>(kBlockElements)),
        dropout_factors(arena.take<float>(kBlockElements)),
        cap_gradients(arena.take<float>(kBlockElements)),
        rows(arena.take<float>(kBlock * kBlockKeys)),
        row_gradients(arena.take<float>(kBlock * kBlockKeys)) {}
};

class RecomputeTiles {
 public:
  RecomputeTiles(const Problem& p, int64_t batch, int64_t head, const Sequence& sequence, const BlockScratch& scratch)
      : p_(p),
        band_(band_of(p, sequence)),
        terms_(p, batch, head, sequence),
        depth_(padded_dim(p.head_dim) / kTileDepth),
        depth_v_(padded_dim(p.head_dim_v) / kTileDepth),
        scale_(static_cast<float>(p.softmax_scale)),
        scratch_(scratch) {
    for (float* factors : {scratch.dropout_factors, scratch.cap_gradients})
      for (int64_t i = 0; i < kBlockElements; ++i) factors[i] = 1;
  }

  //   P = exp(S - lse),  dS = P (dP - delta)
  void operator()(const QueryBlock& queries, const KeyBlock& keys, const BlockResult& result) const {
    product(keys.k, queries.q, depth_, scratch_.s);
    product(keys.v, queries.dout, depth_v_, scratch_.dp);
    const bool general = !p_.plain_scores();
    if (general) apply_terms(queries, keys.key);
    const Interval every = band_.every(queries.row, queries.row + queries.rows);
    if (every.begin > keys.key || every.end < keys.key + kBlock) mask(queries.row, keys.key);
    general ? gradients<true>(scratch_, static_cast<float>(kLog2e), queries, result)
            : gradients<false>(scratch_, scale_ * static_cast<float>(kLog2e), queries, result);
  }

 private:
  // c = A B^T for 32 rows of A and 32 rows of B, both `depth` tiles long.
  static void product(const bfloat16* a, const bfloat16* b, int64_t depth, float* c) {
    const int64_t row_of_tiles = depth * kTileElements;
    block_product<false>({a, row_of_tiles, kTileElements}, {b, row_of_tiles, kTileElements}, depth, c, kBlock);
  }

  // dst = src^T; rows of the two are ld_src and ld_dst apart.
  static void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
    for (int64_t i = 0; i < kBlock; i += kTileSize)
      for (int64_t j = 0; j < kBlock; j += kTileSize) {
        Vec<float> tile[kTileSize];
#pragma GCC unroll 16
        for (int64_t n = 0; n < kTileSize; ++n) tile[n] = Vec<float>::load(src + (i + n) * ld_src + j);
        transpose<float>(tile);
#pragma GCC unroll 16
        for (int64_t n = 0; n < kTileSize; ++n) tile[n].store(dst + (j + n) * ld_dst + i);
      }
  }

  // q.k in scratch.s becomes score - lse, and the factors of dropout and softcap are laid beside it. Terms of the score
  // know rows of queries, so the block is transposed on the way there and back. Subtracting lse here, before the
  // multiplication with log2 e, keeps scores near the largest float finite.
  __attribute__((noinline)) void apply_terms(const QueryBlock& queries, int64_t key) const {
    transpose_block(scratch_.s, kBlock, scratch_.rows, kBlockKeys);
    for (int64_t i = 0; i < queries.rows * kBlockKeys; i += kTileSize)
      (Vec<float>::load(scratch_.rows + i) * scale_).store(scratch_.rows + i);
    terms_.apply(scratch_.rows, queries.row, queries.rows, key, 0, kBlock, scratch_.row_gradients);
    for (int64_t i = 0; i < kBlock; ++i)
      for (int64_t j = 0; j < kBlock; j += kTileSize) {
        float* score = scratch_.rows + i * kBlockKeys + j;
        (Vec<float>::load(score) - queries.lse[i]).store(score);
        if (i >= queries.rows) Vec<float>(1.0f).store(scratch_.row_gradients + i * kBlockKeys + j);
      }
    transpose_block(scratch_.rows, kBlockKeys, scratch_.s, kBlock);
    if (p_.softcap != 0) transpose_block(scratch_.row_gradients, kBlockKeys, scratch_.cap_gradients, kBlock);
    if (terms_.dropout()) {
      for (int64_t i = 0; i < kBlock; ++i)
        terms_.dropout_factors(queries.row + i, key, 0, kBlock, scratch_.rows + i * kBlockKeys);
      transpose_block(scratch_.rows, kBlockKeys, scratch_.dropout_factors, kBlock);
    }
  }

  // -inf where a key is not seen, by all queries where it lies beyond the sequence.
  void mask(int64_t row, int64_t key) const {
    const Vec<float> unseen = minus_infinity<float>();
    float* s = scratch_.s;
    for (int64_t j = key; j < key + kBlock; ++j, s += kBlock) {
      const Interval rows = j < band_.seqlen_k ? band_.rows_any(j, j + 1) : Interval{};
      const Vec<float> begin = static_cast<float>(rows.begin - row), end = static_cast<float>(rows.end - row);
      for (int64_t i = 0; i < kBlock; i += kTileSize) {
        const Vec<float> query = Vec<float>::iota(static_cast<float>(i)), x = Vec<float>::load(s + i);
        select<float>(query.v >= begin.v, select<float>(query.v < end.v, x, unseen), unseen).store(s + i);
      }
    }
  }

  // P and dS of the block. General scores come with lse subtracted and with factors.
  template <bool General>
  static __attribute__((noinline)) void gradients(const BlockScratch& scratch, float scale_log2e,
                                                  const QueryBlock& queries, const BlockResult& result) {
    Vec<float> minus_lse[2], delta[2];
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<float> lse = Vec<float>::load(queries.lse + half * kTileSize);
      minus_lse[half] = General ? Vec<float>(0.0f) : lse * static_cast<float>(-kLog2e);
      delta[half] = Vec<float>::load(queries.delta + half * kTileSize);
    }
    const float *s = scratch.s, *dp = scratch.dp;
    const float *factors = scratch.dropout_factors, *caps = scratch.cap_gradients;
    bfloat16 *prob_row = result.prob, *ds_row = result.ds, *ds_pair = result.ds_right;
    for (int64_t pair = 0; pair < kBlock / 2; ++pair, ds_pair += kTileDepth) {
      Halves ds[2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        Vec<float> p[2], gradient[2];
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t at = half * kTileSize;
          // No probability exceeds 1; beside huge scores, whose rounding is larger than that of lse, it needs a limit.
          const Vec<float> exponent = Vec<float>::load(s + at) * scale_log2e + minus_lse[half];
          p[half] = exp2<3>(min(Vec<float>(0.0f), exponent));
          Vec<float> dp_kept = Vec<float>::load(dp + at);
          if constexpr (General) dp_kept *= Vec<float>::load(factors + at);
          gradient[half] = p[half] * (dp_kept - delta[half]);
          if constexpr (General) {
            gradient[half] *= Vec<float>::load(caps + at);
            p[half] *= Vec<float>::load(factors + at);
          }
        }
        ds[i] = to_halves(gradient[0], gradient[1]);
        store_row(to_halves(p[0], p[1]), prob_row, 0);
        store_row(ds[i], ds_row, 0);
        s += kBlock, dp += kBlock, factors += kBlock, caps += kBlock;
        prob_row += kTileDepth, ds_row += kTileDepth;
      }
      store_row(zip_low(ds[0], ds[1]), ds_pair, 0);
      store_row(zip_high(ds[0], ds[1]), ds_pair + kTileElements, 0);
    }
  }

  const Problem& p_;
  const Band band_;
  const ScoreTerms<float> terms_;
  const int64_t depth_, depth_v_;
  const float scale_;
  const BlockScratch& scratch_;
};

}  // namespace fae::cpu::FAE_LEVEL
