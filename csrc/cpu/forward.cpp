#include "../core/schedule.h"
#include "gemm.h"
#include "kernels.h"
#include "pack.h"
#include "scores.h"
#include "split.h"

// Forward attention (FlashAttention-2, arXiv 2307.08691, algorithm 1) for every type and option: a task is one block
// of query rows of one head and walks the keys its band can see, 64 at a time. K and V are packed per task: the rows
// of a block pay for it (3 % with 768 of them, 12 % with 192), and nothing is shared between threads.

namespace fae::cpu::FAE_LEVEL {
namespace {

// Query rows per task, in whole strips: as many as keep Q and O in the second-level cache, so that few tasks pack the
// same K and V, and fewer where some threads would be left without work. No row's arithmetic depends on the choice.
int64_t block_rows(const Problem& p, int64_t seqlen_q, int threads) {
  const int64_t dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  int64_t rows = dim <= 128 ? 768 : dim <= 256 ? 384 : 192;
  while (rows > 48 && p.batch * p.heads * ceil_div(seqlen_q, rows) < 4 * threads) rows /= 2;
  const int64_t needed = round_up(seqlen_q, kTileRows);
  return rows < needed ? rows : needed;
}

template <class T>
struct Scratch {
  T *q, *o, *k_transposed, *v, *s, *prob;
  RowState<T, Vec<T>>* state;
  size_t bytes;

  Scratch(const Problem& p, int64_t rows, void* base) {
    Arena arena(base);
    q = arena.take<T>(rows * padded<T>(p.head_dim));
    o = arena.take<T>(rows * padded<T>(p.head_dim_v));
    k_transposed = arena.take<T>(p.head_dim * kBlockKeys);
    v = arena.take<T>(kBlockKeys * padded<T>(p.head_dim_v));
    s = arena.take<T>(kTileRows * kBlockKeys);
    prob = arena.take<T>(kStripRows * kBlockKeys);
    state = arena.take<RowState<T, Vec<T>>>(rows);
    bytes = arena.used();
  }
};

template <class T>
class ForwardTile {
 public:
  ForwardTile(const Problem& p, const Tile& tile, int64_t rows, const Scratch<T>& scratch)
      : p_(p),
        tile_(tile),
        sequence_(sequence_of(p, tile.batch)),
        band_(band_of(p, sequence_)),
        terms_(p, tile.batch, tile.head, sequence_),
        head_kv_(tile.head / (p.heads / p.heads_kv)),
        row_begin_(tile.block * rows),
        row_end_(row_begin_ + rows < sequence_.seqlen_q ? row_begin_ + rows : sequence_.seqlen_q),
        ld_v_(padded<T>(p.head_dim_v)),
        scratch_(scratch) {}

  void run() {
    if (row_begin_ >= row_end_) return;
    const int64_t rows = row_end_ - row_begin_;
    pack_rows<T>(rows_of(p_.q, sequence_.q_start + row_begin_, tile_.head), rows, p_.head_dim,
                 static_cast<T>(p_.softmax_scale), scratch_.q);
    for (int64_t i = 0; i < rows * ld_v_; ++i) scratch_.o[i] = 0;
    for (int64_t i = 0; i < rows; ++i) scratch_.state[i] = {};

    const Interval keys = band_.any(row_begin_, row_end_);
    for (int64_t key = keys.begin / kBlockKeys * kBlockKeys; key < keys.end; key += kBlockKeys) {
      const int64_t count = sequence_.seqlen_k - key < kBlockKeys ? sequence_.seqlen_k - key : kBlockKeys;
      pack_transposed<T>(rows_of(p_.k, sequence_.k_start + key, head_kv_), count, p_.head_dim, T(1),
                         scratch_.k_transposed, kBlockKeys);
      pack_rows<T>(rows_of(p_.v, sequence_.k_start + key, head_kv_), count, p_.head_dim_v, T(1), scratch_.v);
      for (int64_t strip = row_begin_; strip < row_end_; strip += kStripRows) {
        prefetch_next_keys(key + kBlockKeys, strip - row_begin_, rows);
        const int64_t end = strip + kStripRows < row_end_ ? strip + kStripRows : row_end_;
        for (int64_t row = strip; row < end; row += kTileRows) probabilities(group(row, end, key), row - strip);
        for (int64_t row = strip; row < end; row += kTileRows) add_values(group(row, end, key), row - strip);
      }
    }
    finish();
  }

 private:
  static constexpr int W = Vec<T>::width;

  Rows rows_of(const TensorView& view, int64_t row, int64_t head) const {
    return Rows(p_.dtype, view, tile_.batch, row, head);
  }

  // Spreads the prefetch of the next key block over the steps through this one.
  void prefetch_next_keys(int64_t key, int64_t local, int64_t rows) const {
    const int64_t begin = key + local * kBlockKeys / rows, end = key + (local + kStripRows) * kBlockKeys / rows;
    const int64_t last = end < sequence_.seqlen_k ? end : sequence_.seqlen_k;
    prefetch_rows(rows_of(p_.k, sequence_.k_start, head_kv_), begin, last, p_.head_dim);
    prefetch_rows(rows_of(p_.v, sequence_.k_start, head_kv_), begin, last, p_.head_dim_v);
  }

  // Up to kTileRows rows, and which columns of the key block they see: any of them, and [first, last) in whole vectors.
  struct Group {
    int64_t row, rows, key, first, last, col_begin, col_end;
    bool whole;  // every row sees every column
  };
  Group group(int64_t row, int64_t strip_end, int64_t key) const {
    const int64_t end = row + kTileRows < strip_end ? row + kTileRows : strip_end;
    const Interval any = band_.any(row, end), every = band_.every(row, end);
    const int64_t first = any.begin > key ? any.begin - key : 0;
    const int64_t last = any.end - key < kBlockKeys ? any.end - key : kBlockKeys;
    const bool whole = every.begin <= key && every.end >= key + kBlockKeys;
    return {row, end - row, key, first, last, first / W * W, (last + W - 1) / W * W, whole};
  }

  // S = Q K^T,  P = exp(S - m) into the strip's rows from `slot` on
  void probabilities(const Group& g, int64_t slot) {
    if (g.first >= g.last) return;
    const int64_t local = g.row - row_begin_;
    gemm<T>({.a = scratch_.q + local * padded<T>(p_.head_dim),
             .a_row = padded<T>(p_.head_dim),
             .b = scratch_.k_transposed + g.col_begin,
             .ldb = kBlockKeys,
             .c = scratch_.s + g.col_begin,
             .ldc = kBlockKeys,
             .rows = g.rows,
             .cols = g.col_end - g.col_begin,
             .depth = p_.head_dim});
    RowState<T, Vec<T>>* state = scratch_.state + local;
    T* prob = scratch_.prob + slot * kBlockKeys;
    if (terms_.any()) terms_.apply(scratch_.s, g.row, g.rows, g.key, g.col_begin, g.col_end);
    if (!g.whole || terms_.any() || !stale_softmax(state, g.rows, prob)) {
      if (!g.whole)
        for (int64_t i = 0; i < g.rows; ++i)
          mask_band(scratch_.s + i * kBlockKeys, band_, g.row + i, g.key, g.col_begin, g.col_end);
      exact_softmax(state, g, scratch_.o + local * ld_v_, prob);
    }
    if (terms_.dropout()) drop(g, prob);
  }

  // O += P V
  void add_values(const Group& g, int64_t slot) const {
    if (g.first >= g.last) return;
    gemm<T>({.a = scratch_.prob + slot * kBlockKeys + g.first,
             .a_row = kBlockKeys,
             .b = scratch_.v + g.first * ld_v_,
             .ldb = ld_v_,
             .c = scratch_.o + (g.row - row_begin_) * ld_v_,
             .ldc = ld_v_,
             .rows = g.rows,
             .cols = ld_v_,
             .depth = g.last - g.first,
             .accumulate = true});
  }

  // P = exp(S - m) with the maximum of earlier blocks, which saves the search and the rescaling (3-10 %). Exact as long
  // as no sum grows out of range, since m cancels in the end; false says that one did, or that there is no m yet, and
  // leaves the statistics as they were.
  bool stale_softmax(RowState<T, Vec<T>>* state, int64_t rows, T* prob) const {
    constexpr T kSumLimit = 65536;  // P stays far from overflow, also after the product with V
    for (int64_t i = 0; i < rows; ++i)
      if (!(state[i].m > minus_infinity<T>())) return false;
    Vec<T> sums[kTileRows], total = T(0);
    for (int64_t i = 0; i < rows; ++i, prob += kBlockKeys) {
      const T* s = scratch_.s + i * kBlockKeys;
      const Vec<T> log2e = static_cast<T>(kLog2e), m_log2e = state[i].m * static_cast<T>(kLog2e);
      sums[i] = T(0);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockKeys; j += W) {
        const Vec<T> e = exp2(Vec<T>::load(s + j) * log2e - m_log2e);
        e.store(prob + j);
        sums[i] += e;
      }
      total += sums[i];
    }
    if (!(sum(total) < kSumLimit)) return false;  // NaN included
    for (int64_t i = 0; i < rows; ++i) state[i].l += sums[i];
    return true;
  }

  void exact_softmax(RowState<T, Vec<T>>* state, const Group& g, T* o, T* prob) const {
    for (int64_t i = 0; i < g.rows; ++i, o += ld_v_, prob += kBlockKeys) {
      const T* s = scratch_.s + i * kBlockKeys;
      Vec<T> block_max = minus_infinity<T>();
      for (int64_t j = g.col_begin; j < g.col_end; j += W) block_max = max(Vec<T>::load(s + j), block_max);
      const T factor = state[i].update_max(max(block_max));
      if (factor != T(1))
        for (int64_t d = 0; d < ld_v_; d += W) (Vec<T>::load(o + d) * factor).store(o + d);
      const Vec<T> m = finite_max(state[i].m);
      for (int64_t j = g.col_begin; j < g.col_end; j += W) {
        const Vec<T> e = exp_of(Vec<T>::load(s + j) - m);
        e.store(prob + j);
        state[i].l += e;
      }
    }
  }

  void drop(const Group& g, T* prob) const {
    T factors[kBlockKeys];
    for (int64_t i = 0; i < g.rows; ++i, prob += kBlockKeys) {
      terms_.dropout_factors(g.row + i, g.key, g.col_begin, g.col_end, factors);
      for (int64_t j = g.col_begin; j < g.col_end; ++j) prob[j] *= factors[j];
    }
  }

  // O / l and lse = m + log l, the sink counted in.
  void finish() const {
    for (int64_t row = row_begin_; row < row_end_; ++row) {
      RowState<T> state = scratch_.state[row - row_begin_].total();
      const T factor = p_.sinks ? state.add_sink(static_cast<const T*>(p_.sinks)[tile_.head]) : T(1);
      unpack_rows<T>(scratch_.o + (row - row_begin_) * ld_v_, 1, p_.head_dim_v, factor * state.inverse_sum(),
                     rows_of(p_.out, sequence_.q_start + row, tile_.head));
      *stats_ptr<T>(p_.lse, tile_.batch, sequence_.q_start + row, tile_.head) = state.lse();
    }
  }

  const Problem& p_;
  const Tile tile_;
  const Sequence sequence_;
  const Band band_;
  const ScoreTerms<T> terms_;
  const int64_t head_kv_, row_begin_, row_end_, ld_v_;
  const Scratch<T>& scratch_;
};

template <class T>
void run_forward(const Problem& p, const Execution& execution) {
  const int64_t longest = LongestSequence(p).q, rows = block_rows(p, longest, execution.threads);
  if (longest == 0) return;
  const TileSchedule schedule(p.batch, p.heads, longest, rows);
  const size_t bytes = Scratch<T>(p, rows, nullptr).bytes;
  execution.parallel(schedule.size(), [&](int64_t task, int worker) {
    const Scratch<T> scratch(p, rows, static_cast<char*>(execution.workspace) + worker * bytes);
    ForwardTile<T>(p, schedule[task], rows, scratch).run();
  });
}

template <class T>
size_t workspace(const Problem& p, int threads) {
  return threads * Scratch<T>(p, block_rows(p, LongestSequence(p).q, threads), nullptr).bytes;
}

}  // namespace

size_t forward_workspace(const Problem& p, int threads) {
  return p.dtype == DType::float64 ? workspace<double>(p, threads) : workspace<float>(p, threads);
}

void forward(const Problem& p, const Execution& execution) {
  p.dtype == DType::float64 ? run_forward<double>(p, execution) : run_forward<float>(p, execution);
}

}  // namespace fae::cpu::FAE_LEVEL
