#include "../core/schedule.h"
#include "kernels.h"
#include "pack_tiles.h"
#include "scores.h"
#include "split.h"

// Forward attention in bfloat16 on matrix tiles (FlashAttention-2, arXiv 2307.08691, algorithm 1), every option.
// A task walks blocks of 256 keys: it packs K and V of the block once and brings each of its units, 32 query rows of a
// head, past it. S never leaves the first-level cache: 64 keys at a time go from the tiles to a scratch of 8 KB,
// through the exponential and into the tiles of P. O is loaded and stored once per block.

namespace fae::cpu::FAE_LEVEL {
namespace {

constexpr int64_t kUnitRows = 32;
constexpr int64_t kKeys = 256;                   // keys packed at a time
constexpr int64_t kPanels = kKeys / kBlockKeys;  // of 64 keys, whose scores are 64 floats a row
constexpr int64_t kPanelScores = kUnitRows * kBlockKeys;
constexpr int64_t kProbPair = kKeys * kTileSize;  // from a tile of P to the one of the next 16 rows

// A task is `rows` query rows of each of `heads` query heads of one KV head: about 512 rows in all, which pay for
// packing K and V (3 %), fewer where O would leave the second-level cache or tasks would be few. The choice depends on
// shapes alone.
struct ForwardCut {
  int64_t longest, rows, heads = 1;

  explicit ForwardCut(const Problem& p) : longest(LongestSequence(p).q) {
    constexpr int64_t kTasks = 16, kMinRows = 128;
    const int64_t limit = p.head_dim + p.head_dim_v <= 512 ? 512 : 256;
    rows = limit;
    while (rows > kMinRows && p.batch * p.heads * ceil_div(longest, rows) < kTasks) rows /= 2;
    if (rows > longest) rows = round_up(longest > 0 ? longest : 1, kUnitRows);
    const int64_t tasks = p.batch * p.heads * ceil_div(longest, rows);
    for (int64_t n = 2; n * rows <= limit && tasks / n >= kTasks; ++n)
      if (p.heads / p.heads_kv % n == 0) heads = n;
  }
  TileSchedule schedule(const Problem& p) const { return {p.batch, p.heads / heads, longest, rows}; }
  int64_t units() const { return heads * ceil_div(rows, kUnitRows); }
};

using State = RowState<float, Vec<float>>;

struct Scratch {
  bfloat16 *k, *v;  // the packed block of keys
  bfloat16* q;      // [unit] left tiles
  float* o;         // [unit][kUnitRows][padded head_dim_v]
  State* state;     // [unit][kUnitRows]
  float* s;         // [panel][kUnitRows][kBlockKeys]
  bfloat16* prob;   // left tiles [2][kKeys / 32]
  size_t bytes;

  Scratch(const Problem& p, const ForwardCut& cut, void* base) {
    Arena arena(base);
    k = arena.take<bfloat16>(kKeys * padded_dim(p.head_dim));
    v = arena.take<bfloat16>(kKeys * padded_dim(p.head_dim_v));
    q = arena.take<bfloat16>(cut.units() * kUnitRows * padded_dim(p.head_dim));
    o = arena.take<float>(cut.units() * kUnitRows * padded_dim(p.head_dim_v));
    state = arena.take<State>(cut.units() * kUnitRows);
    s = arena.take<float>(kPanels * kPanelScores);
    prob = arena.take<bfloat16>(2 * kProbPair);
    bytes = arena.used();
  }
};

// Rows [row, row + rows) of a query head and what is kept of them.
struct Unit {
  int64_t head, row, rows;
  bfloat16* q;
  float* o;
  State* state;
};

class ForwardTask {
 public:
  ForwardTask(const Problem& p, const Tile& tile, const ForwardCut& cut, const Scratch& scratch)
      : p_(p),
        batch_(tile.batch),
        head_begin_(tile.head * cut.heads),
        head_end_(head_begin_ + cut.heads),
        sequence_(sequence_of(p, tile.batch)),
        band_(band_of(p, sequence_)),
        row_begin_(tile.block * cut.rows),
        row_end_(row_begin_ + cut.rows < sequence_.seqlen_q ? row_begin_ + cut.rows : sequence_.seqlen_q),
        depth_(padded_dim(p.head_dim) / kTileDepth),
        ld_o_(padded_dim(p.head_dim_v)),
        scale_(static_cast<float>(p.softmax_scale)),
        scratch_(scratch) {}

  void run() {
    if (row_begin_ >= row_end_) return;
    for_units([&](const Unit& unit) { begin(unit); });
    const Interval keys = band_.any(row_begin_, row_end_);
    for (int64_t key = keys.begin / kTileDepth * kTileDepth; key < keys.end; key += kKeys) {
      pack_keys(key, keys.end - key < kKeys ? keys.end - key : kKeys);
      for_units([&](const Unit& unit) { step(unit, key); });
    }
    for_units([&](const Unit& unit) { finish(unit); });
  }

 private:
  template <class F>
  FAE_INLINE void for_units(F&& f) const {
    int64_t index = 0;
    for (int64_t head = head_begin_; head < head_end_; ++head)
      for (int64_t row = row_begin_; row < row_end_; row += kUnitRows, ++index)
        f(Unit{head, row, row_end_ - row < kUnitRows ? row_end_ - row : kUnitRows,
               scratch_.q + index * kUnitRows * depth_ * kTileDepth, scratch_.o + index * kUnitRows * ld_o_,
               scratch_.state + index * kUnitRows});
  }

  // Rows beyond the sequence are rows of zeros with a maximum of 0: they go along and are never read.
  void begin(const Unit& unit) const {
    const Rows q(p_.dtype, p_.q, batch_, sequence_.q_start + unit.row, unit.head);
    pack_left(Matrix(q, unit.rows, p_.head_dim), kUnitRows, unit.q);
    std::memset(unit.o, 0, kUnitRows * ld_o_ * sizeof(float));
    for (int64_t i = 0; i < kUnitRows; ++i) {
      unit.state[i] = {};
      if (i >= unit.rows) unit.state[i].m = 0;
    }
  }

  void pack_keys(int64_t key, int64_t count) const {
    const int64_t head = head_begin_ / (p_.heads / p_.heads_kv), padded = round_up(count, kTileDepth);
    const Rows k(p_.dtype, p_.k, batch_, sequence_.k_start + key, head);
    const Rows v(p_.dtype, p_.v, batch_, sequence_.k_start + key, head);
    pack_right_transposed(Matrix(k, count, p_.head_dim), padded, scratch_.k);
    pack_right(Matrix(v, count, p_.head_dim_v), padded, scratch_.v);
  }

  // A unit against the packed block at `key`:  S = Q K^T,  P = exp(S - m),  O += P V.
  void step(const Unit& unit, int64_t key) const {
    const Interval any = band_.any(unit.row, unit.row + unit.rows);
    const int64_t first = any.begin > key ? (any.begin - key) / kTileDepth * kTileDepth : 0;
    const int64_t last = any.end - key < kKeys ? round_up(any.end - key, kTileDepth) : kKeys;
    if (any.empty() || first >= last) return;
    if (!p_.plain_scores() || !stale_softmax(unit, key, first, last)) exact_softmax(unit, key, first, last);
    add_values(unit, first, last);
  }

  // s[32][cols] = Q K^T for the keys [col, col + cols) of the block.
  void scores(const Unit& unit, int64_t col, int64_t cols, float* s) const {
    const int64_t row_of_tiles = depth_ * kTileElements;
    const bfloat16* k = scratch_.k + col / kTileSize * row_of_tiles;
    for (int64_t j = 0; j < cols; j += kTileDepth, k += 2 * row_of_tiles)
      block_product<false>({unit.q, row_of_tiles, kTileElements}, {k, row_of_tiles, kTileElements}, depth_, s + j,
                           kBlockKeys);
  }

  // O += P V over the keys [first, last) of the block.
  void add_values(const Unit& unit, int64_t first, int64_t last) const {
    const bfloat16* prob = scratch_.prob + first * kTileSize;
    const bfloat16* v = scratch_.v + first * ld_o_;
    for (int64_t d = 0; d < ld_o_; d += 2 * kTileSize, v += 2 * kTileElements)
      block_product<true>({prob, kProbPair, kTileElements}, {v, kTileElements, kTileDepth * ld_o_},
                          (last - first) / kTileDepth, unit.o + d, ld_o_);
  }

  // P = exp(S - m) with the maximum of earlier keys, which saves the search and the rescaling (9-16 %): exact as long
  // as no sum grows out of range, since m cancels in the end. The first keys give a row its first m. False says that a
  // sum did grow, or that a row has no m, and leaves the sums as they were.
  bool stale_softmax(const Unit& unit, int64_t key, int64_t first, int64_t last) const {
    constexpr float kSumLimit = 65536;  // P stays far from overflow, also after the product with V
    const Interval every = band_.every(unit.row, unit.row + unit.rows);
    const float scale_log2e = scale_ * static_cast<float>(kLog2e);
    float minus_m[kUnitRows];
    Vec<float> sums[kUnitRows];
    for (int64_t i = 0; i < kUnitRows; ++i) sums[i] = 0.0f;

    for (int64_t col = first; col < last; col += kBlockKeys) {
      const int64_t cols = last - col < kBlockKeys ? last - col : kBlockKeys;
      scores(unit, col, cols, scratch_.s);
      if (every.begin > key + col || every.end < key + col + cols) mask(unit, key + col, cols, scratch_.s);
      if (col == first) {
        for (int64_t i = 0; i < kUnitRows; ++i) {
          float& m = unit.state[i].m;
          if (m == minus_infinity<float>()) m = row_max(scratch_.s + i * kBlockKeys, cols, scale_);
          if (!(m > minus_infinity<float>())) return false;
          minus_m[i] = -m * static_cast<float>(kLog2e);
        }
      }
      bfloat16* prob = scratch_.prob + col * kTileSize;
      cols == kBlockKeys ? exponentials<kBlockKeys>(scratch_.s, scale_log2e, minus_m, prob, sums)
                         : exponentials<kTileDepth>(scratch_.s, scale_log2e, minus_m, prob, sums);
    }

    Vec<float> total = 0.0f;
    for (int64_t i = 0; i < kUnitRows; ++i) total += sums[i];
    if (!(sum(total) < kSumLimit)) return false;  // NaN included
    for (int64_t i = 0; i < kUnitRows; ++i) unit.state[i].l += sums[i];
    return true;
  }

  // P = 2^(scale_log2e * S + minus_m) for 32 rows by Cols keys, and the sums of its rows before rounding.
  template <int64_t Cols>
  static __attribute__((noinline)) void exponentials(const float* s, float scale_log2e, const float* minus_m,
                                                     bfloat16* prob, Vec<float>* sums) {
    for (int64_t i = 0; i < kUnitRows; ++i, s += kBlockKeys) {
      bfloat16* tile = prob + i / kTileSize * kProbPair;
      Vec<float> row_sum = sums[i];
#pragma GCC unroll 2
      for (int64_t j = 0; j < Cols; j += kTileDepth, tile += kTileElements) {
        const Vec<float> low = exp2<3>(Vec<float>::load(s + j) * scale_log2e + minus_m[i]);
        const Vec<float> high = exp2<3>(Vec<float>::load(s + j + kTileSize) * scale_log2e + minus_m[i]);
        row_sum += low + high;
        store_row(to_halves(low, high), tile, i % kTileSize);
      }
      sums[i] = row_sum;
    }
  }

  // The general way: all scores of the block with their terms and masks, then the maximum and P.
  void exact_softmax(const Unit& unit, int64_t key, int64_t first, int64_t last) const {
    const ScoreTerms<float> terms(p_, batch_, unit.head, sequence_);
    const Interval every = band_.every(unit.row, unit.row + unit.rows);
    for (int64_t col = first; col < last; col += kBlockKeys) {
      const int64_t cols = last - col < kBlockKeys ? last - col : kBlockKeys;
      float* s = panel(first, col);
      scores(unit, col, cols, s);
      for (int64_t i = 0; i < unit.rows; ++i)
        for (int64_t j = 0; j < cols; j += kTileSize)
          (Vec<float>::load(s + i * kBlockKeys + j) * scale_).store(s + i * kBlockKeys + j);
      if (terms.any()) terms.apply(s, unit.row, unit.rows, key + col, 0, cols);
      if (every.begin > key + col || every.end < key + col + cols) mask(unit, key + col, cols, s);
    }
    for (int64_t i = 0; i < unit.rows; ++i) exact_row(unit, terms, i, key, first, last);
  }

  void exact_row(const Unit& unit, const ScoreTerms<float>& terms, int64_t i, int64_t key, int64_t first,
                 int64_t last) const {
    State& state = unit.state[i];
    float block_max = minus_infinity<float>();
    for (int64_t col = first; col < last; col += kBlockKeys) {
      const float panel_max = row_max(panel(first, col) + i * kBlockKeys, last - col, 1.0f);
      block_max = block_max > panel_max ? block_max : panel_max;
    }
    const float factor = state.update_max(block_max);
    if (factor != 1.0f) {
      float* o = unit.o + i * ld_o_;
      for (int64_t d = 0; d < ld_o_; d += kTileSize) (Vec<float>::load(o + d) * factor).store(o + d);
    }

    const float m = finite_max(state.m), log2e = static_cast<float>(kLog2e);
    bfloat16* tile = scratch_.prob + i / kTileSize * kProbPair + first * kTileSize;
    float factors[kBlockKeys];
    for (int64_t col = first; col < last; col += kTileDepth, tile += kTileElements) {
      // Subtracting first keeps scores near the largest float finite.
      const float* s = panel(first, col) + i * kBlockKeys + (col - first) % kBlockKeys;
      Vec<float> low = exp2<3>((Vec<float>::load(s) - m) * log2e);
      Vec<float> high = exp2<3>((Vec<float>::load(s + kTileSize) - m) * log2e);
      state.l += low + high;
      if (terms.dropout()) {
        terms.dropout_factors(unit.row + i, key + col, 0, kTileDepth, factors);
        low *= Vec<float>::load(factors);
        high *= Vec<float>::load(factors + kTileSize);
      }
      store_row(to_halves(low, high), tile, i % kTileSize);
    }
  }

  // The scores of the 64 keys that hold block column `col`, in a block whose first column is `first`.
  float* panel(int64_t first, int64_t col) const { return scratch_.s + (col - first) / kBlockKeys * kPanelScores; }

  // The largest of at most 64 scaled scores; a NaN counts as nothing.
  static float row_max(const float* s, int64_t cols, float scale) {
    Vec<float> result = minus_infinity<float>();
    for (int64_t j = 0; j < cols && j < kBlockKeys; j += kTileSize)
      result = max(Vec<float>::load(s + j) * scale, result);
    return max(result);
  }

  // -inf where a row does not see a key of [key, key + cols).
  void mask(const Unit& unit, int64_t key, int64_t cols, float* s) const {
    const Vec<float> unseen = minus_infinity<float>();
    for (int64_t i = 0; i < unit.rows; ++i, s += kBlockKeys) {
      const Vec<float> lo = static_cast<float>(band_.lo(unit.row + i) - key);
      const Vec<float> hi = static_cast<float>(band_.hi(unit.row + i) - key);
      for (int64_t j = 0; j < cols; j += kTileSize) {
        const Vec<float> col = Vec<float>::iota(static_cast<float>(j));
        const Vec<float> x = Vec<float>::load(s + j);
        select<float>(col.v >= lo.v, select<float>(col.v < hi.v, x, unseen), unseen).store(s + j);
      }
    }
  }

  // O / l and lse = m + log l, the sink counted in.
  void finish(const Unit& unit) const {
    const int64_t first_row = sequence_.q_start + unit.row;
    const Rows out(p_.dtype, p_.out, batch_, first_row, unit.head);
    float* lse = stats_ptr<float>(p_.lse, batch_, first_row, unit.head);
    const float* o = unit.o;
    for (int64_t i = 0; i < unit.rows; ++i, o += ld_o_) {
      RowState<float> state = unit.state[i].total();
      const float factor = p_.sinks ? state.add_sink(static_cast<const float*>(p_.sinks)[unit.head]) : 1.0f;
      const Vec<float> scale = factor * state.inverse_sum();
      for (int64_t d = 0; d < p_.head_dim_v; d += kTileSize)
        write_vector(Vec<float>::load(o + d) * scale, out, i, d, p_.head_dim_v);
      lse[i * p_.lse.stride_row] = state.lse();
    }
  }

  const Problem& p_;
  const int64_t batch_, head_begin_, head_end_;
  const Sequence sequence_;
  const Band band_;
  const int64_t row_begin_, row_end_, depth_, ld_o_;
  const float scale_;
  const Scratch& scratch_;
};

}  // namespace

size_t forward_workspace(const Problem& p, int threads) { return threads * Scratch(p, ForwardCut(p), nullptr).bytes; }

void forward(const Problem& p, const Execution& execution) {
  const ForwardCut cut(p);
  if (cut.longest == 0) return;
  const TileSchedule schedule = cut.schedule(p);
  const size_t bytes = Scratch(p, cut, nullptr).bytes;
  execution.parallel(schedule.size(), [&](int64_t task, int worker) {
    const Scratch scratch(p, cut, static_cast<char*>(execution.workspace) + worker * bytes);
    const TileUnit tiles;
    ForwardTask(p, schedule[task], cut, scratch).run();
  });
}

}  // namespace fae::cpu::FAE_LEVEL
