#include "../core/schedule.h"
#include "kernels.h"
#include "pack.h"
#include "scores.h"
#include "split.h"

// Forward attention for a few query rows, such as one new token against a long history. Memory bounds it: K and V are
// read once, where they lie, row by row for all heads, which is the order of memory. Histories are cut into chunks of
// keys, whose results join by the block formula of the online softmax.

namespace fae::cpu::FAE_LEVEL {
namespace {

// The cut of a history depends on its length alone, so that a sequence's bits do not depend on the batch. Chunks of a
// packed batch are numbered through all sequences, so that one long history does not give every other as many.
struct DecodeSplit {
  static constexpr int64_t kChunkKeys = 256;
  int64_t group, rows;    // rows: of all heads
  GridSchedule schedule;  // a task is a number of a chunk; some number none

  explicit DecodeSplit(const Problem& p) : DecodeSplit(p, LongestSequence(p)) {}

  // Without keys there is one chunk, which says so.
  static int64_t chunks(const Sequence& s) { return s.seqlen_k > 0 ? ceil_div(s.seqlen_k, kChunkKeys) : 1; }

 private:
  DecodeSplit(const Problem& p, const LongestSequence& longest)
      : group(p.heads / p.heads_kv),
        rows(longest.q * p.heads),
        schedule(p.batch, 1, longest.k > 0 ? longest.k : 1, kChunkKeys, p.cu_seqlens_k, p.total_k) {}
};

// What a task makes of its keys: statistics and unnormalised output of every row, rows ordered [head][query].
template <class T>
struct Partial {
  RowState<T, Vec<T>>* state;
  T* o;
  size_t bytes;

  Partial(const Problem& p, const DecodeSplit& split, void* base) {
    Arena arena(base);
    state = arena.take<RowState<T, Vec<T>>>(split.rows);
    o = arena.take<T>(split.rows * padded<T>(p.head_dim_v));
    bytes = arena.used();
  }
};

template <class T>
struct Scratch {
  T *q, *prob;
  size_t bytes;

  Scratch(const Problem& p, const DecodeSplit& split, void* base) {
    Arena arena(base);
    q = arena.take<T>(split.rows * padded<T>(p.head_dim));
    prob = arena.take<T>(split.rows * kBlockKeys);
    bytes = arena.used();
  }
};

template <class T, class S>
class DecodeTask {
 public:
  DecodeTask(const Problem& p, const DecodeSplit& split, int64_t batch, const Partial<T>& partial,
             const Scratch<T>& scratch)
      : p_(p),
        split_(split),
        batch_(batch),
        sequence_(sequence_of(p, batch_)),
        band_(band_of(p, sequence_)),
        rows_(sequence_.seqlen_q * p.heads),
        rows_per_kv_(sequence_.seqlen_q * split.group),
        ld_qk_(padded<T>(p.head_dim)),
        ld_v_(padded<T>(p.head_dim_v)),
        partial_(partial),
        scratch_(scratch) {}

  void run(int64_t chunk) {
    if (chunk >= chunks()) return;
    for (int64_t r = 0; r < rows_; ++r) {
      pack_rows<T>(Rows(p_.dtype, p_.q, batch_, sequence_.q_start + query(r), head(r)), 1, p_.head_dim,
                   static_cast<T>(p_.softmax_scale), scratch_.q + r * ld_qk_);
      partial_.state[r] = {};
    }
    for (int64_t i = 0; i < rows_ * ld_v_; ++i) partial_.o[i] = 0;
    const Interval seen = band_.any(0, sequence_.seqlen_q);
    const int64_t begin = chunk * DecodeSplit::kChunkKeys, end = begin + DecodeSplit::kChunkKeys;
    for (int64_t key = begin; key < end; key += kBlockKeys)
      if (key < seen.end && key + kBlockKeys > seen.begin) step(key);
  }

  int64_t chunks() const { return DecodeSplit::chunks(sequence_); }

  // O / l and lse of every row.
  void finish() const {
    for (int64_t r = 0; r < rows_; ++r) {
      RowState<T> state = partial_.state[r].total();
      const T factor = p_.sinks ? state.add_sink(static_cast<const T*>(p_.sinks)[head(r)]) : T(1);
      unpack_rows<T>(partial_.o + r * ld_v_, 1, p_.head_dim_v, factor * state.inverse_sum(),
                     Rows(p_.dtype, p_.out, batch_, sequence_.q_start + query(r), head(r)));
      *stats_ptr<T>(p_.lse, batch_, sequence_.q_start + query(r), head(r)) = state.lse();
    }
  }

  // Takes the result of another chunk in.
  void join(const Partial<T>& other) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const auto [mine, theirs] = partial_.state[r].join(other.state[r]);
      T* o = partial_.o + r * ld_v_;
      for (int64_t d = 0; d < ld_v_; d += W)
        (Vec<T>::load(o + d) * mine + Vec<T>::load(other.o + r * ld_v_ + d) * theirs).store(o + d);
    }
  }

 private:
  static constexpr int W = Vec<T>::width;

  int64_t query(int64_t r) const { return r % sequence_.seqlen_q; }
  int64_t head(int64_t r) const { return r / sequence_.seqlen_q; }

  void step(int64_t key) {
    const int64_t count = sequence_.seqlen_k - key < kBlockKeys ? sequence_.seqlen_k - key : kBlockKeys;
    const int64_t cols = padded<T>(count);
    scores(key, count);
    for (int64_t r = 0; r < rows_; ++r) {
      T* s = scratch_.prob + r * kBlockKeys;
      const ScoreTerms<T> terms(p_, batch_, head(r), sequence_);
      if (terms.any()) terms.apply(s, query(r), 1, key, 0, cols);
      mask_band(s, band_, query(r), key, 0, cols);
      softmax(partial_.state[r], s, partial_.o + r * ld_v_, cols);
      if (terms.dropout()) {
        T factors[kBlockKeys];
        terms.dropout_factors(query(r), key, 0, cols, factors);
        for (int64_t j = 0; j < cols; ++j) s[j] *= factors[j];
      }
    }
    accumulate(key, count);
  }

  // Calls f<R>(first row) for the rows of a KV head in tiles of R = 4, 2 or 1 rows, which share every load of K and V.
  template <class F>
  void for_row_tiles(F&& f) const {
    int64_t r = 0;
    for (; rows_per_kv_ - r >= 4; r += 4) f.template operator()<4>(r);
    for (; rows_per_kv_ - r >= 2; r += 2) f.template operator()<2>(r);
    if (r < rows_per_kv_) f.template operator()<1>(r);
  }

  // Every line of memory is asked for some rows ahead, past the last row too, one by one between the operations on the
  // lines that are there. And into the second-level cache: rows are often a multiple of 4 KB apart, and as many of them
  // as hide the latency do not fit into one set of the first level. Into the first level and four rows ahead, a token
  // against 4096 keys takes 1.2 to 1.7 times as long on Zen 4, and 0.9 to 1.1 times, as rows lie, on a Xeon with AMX.
  static constexpr int64_t kAheadRows = 16;
  static FAE_INLINE void prefetch(const S* p) { __builtin_prefetch(p, 0, 2); }
  static constexpr int64_t kLine = 64 / sizeof(S);  // elements

  // S = Q K^T, four keys at a time in all heads, which is the order of memory.
  void scores(int64_t key, int64_t count) const {
    for (int64_t j = 0; j < count; j += W)
      for_row_tiles([&]<int R>(int64_t row) {
        for (int64_t i = j, head = 0; i < j + W && i < count;) dot_products<R>(key, count - 1, row, i, head);
      });
  }

  // A vector of products: R rows with K keys from i on, in `head` and in the next ones, after the last of which come
  // the next K keys. A sum per lane of every pair, then all pairs' lanes added up, which leaves one pair's product in
  // each lane. Past the last key that one comes again, and is masked later. Leaves i and head where to go on.
  template <int R>
  void dot_products(int64_t key, int64_t last, int64_t row, int64_t& i, int64_t& head) const {
    constexpr int K = 4 < W / R ? 4 : W / R, H = W / (R * K);
    const int64_t ahead = kAheadRows * p_.k.stride_row;
    Vec<T> sums[W];
    T* results[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const int64_t first = head * rows_per_kv_ + row;
      results[h] = scratch_.prob + first * kBlockKeys + i;
      const T* q = scratch_.q + first * ld_qk_;
      const S* k[K];
#pragma GCC unroll 4
      for (int x = 0; x < K; ++x)
        k[x] = row_ptr<S>(p_.k, batch_, sequence_.k_start + key + (i + x < last ? i + x : last), head);
      Vec<T> own[R * K];
#pragma GCC unroll 16
      for (int x = 0; x < R * K; ++x) own[x] = T(0);
      const auto add = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
        Vec<T> q_d[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) q_d[r] = Vec<T>::load(q + r * ld_qk_ + d);
#pragma GCC unroll 4
        for (int x = 0; x < K; ++x) {
          const Vec<T> k_d = load_as<T>(k[x] + d, n);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) own[r * K + x] += k_d * q_d[r];
        }
      };
      int64_t d = 0;
      for (; d + kLine <= p_.head_dim; d += kLine) {
#pragma GCC unroll 4
        for (int x = 0; x < K; ++x) prefetch(k[x] + ahead + d);
#pragma GCC unroll 16
        for (int n = 0; n < kLine; n += W) add(d + n, W);
      }
      for (; d < p_.head_dim; d += W) add(d, p_.head_dim - d);
#pragma GCC unroll 16
      for (int x = 0; x < R * K; ++x) sums[h * R * K + x] = own[x];
      if (++head == p_.heads_kv) head = 0, i += K;
    }
    T dots[W];
    lane_sums<T>(sums).store(dots);
    for (int x = 0; x < R * H; ++x) std::memcpy(results[x / R] + x % R * kBlockKeys, dots + x * K, K * sizeof(T));
  }

  void softmax(RowState<T, Vec<T>>& state, T* s, T* o, int64_t cols) const {
    Vec<T> block_max = minus_infinity<T>();
    for (int64_t j = 0; j < cols; j += W) block_max = max(Vec<T>::load(s + j), block_max);
    const T factor = state.update_max(max(block_max));
    if (factor != T(1))
      for (int64_t d = 0; d < ld_v_; d += W) (Vec<T>::load(o + d) * factor).store(o + d);
    const Vec<T> m = finite_max(state.m);
    for (int64_t j = 0; j < cols; j += W) {
      const Vec<T> e = exp_of(Vec<T>::load(s + j) - m);
      e.store(s + j);
      state.l += e;
    }
  }

  // O += P V, eight rows of V at a time, so that O is loaded and stored once for them.
  void accumulate(int64_t key, int64_t count) const {
    constexpr int64_t kRows = 8;
    for (int64_t j = 0; j < count; j += kRows) {
      const int64_t keys = count - j < kRows ? count - j : kRows;
      for (int64_t head = 0; head < p_.heads_kv; ++head) {
        const S* v = row_ptr<S>(p_.v, batch_, sequence_.k_start + key + j, head);
        for_row_tiles([&]<int R>(int64_t row) {
          const int64_t r = head * rows_per_kv_ + row;
          add_values<R, 8 / R>(scratch_.prob + r * kBlockKeys + j, v, keys, partial_.o + r * ld_v_, 0);
        });
      }
    }
  }

  // R rows of O from column d on, N vectors of columns at a time.
  template <int R, int N>
  void add_values(const T* prob, const S* v, int64_t keys, T* o, int64_t d) const {
    for (; d + N * W <= p_.head_dim_v; d += N * W) add_columns<R, N>(prob, v + d, keys, o + d, N * W);
    if constexpr (N > 1)
      add_values<R, N / 2>(prob, v, keys, o, d);
    else if (d < p_.head_dim_v)
      add_columns<R, 1>(prob, v + d, keys, o + d, p_.head_dim_v - d);
  }

  template <int R, int N>
  FAE_INLINE void add_columns(const T* prob, const S* v, int64_t keys, T* o, int64_t cols) const {
    Vec<T> sums[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = Vec<T>::load(o + r * ld_v_ + n * W);
    for (int64_t i = 0; i < keys; ++i, v += p_.v.stride_row) {
#pragma GCC unroll 8
      for (int n = 0; n < N * W; n += kLine) prefetch(v + kAheadRows * p_.v.stride_row + n);
      Vec<T> p[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) p[r] = prob[r * kBlockKeys + i];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vec<T> x = load_as<T>(v + n * W, cols - n * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][n] += p[r] * x;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n].store(o + r * ld_v_ + n * W);
  }

  const Problem& p_;
  const DecodeSplit& split_;
  const int64_t batch_;
  const Sequence sequence_;
  const Band band_;
  const int64_t rows_, rows_per_kv_, ld_qk_, ld_v_;
  const Partial<T>& partial_;
  const Scratch<T>& scratch_;
};

// Workspace: the partial results of all chunks, then every worker's scratch.
template <class T>
size_t workspace(const Problem& p, int threads) {
  const DecodeSplit split(p);
  return split.schedule.size() * Partial<T>(p, split, nullptr).bytes + threads * Scratch<T>(p, split, nullptr).bytes;
}

template <class T, class S>
void run_decode(const Problem& p, const Execution& execution) {
  const DecodeSplit split(p);
  const size_t partial_bytes = Partial<T>(p, split, nullptr).bytes;
  const size_t scratch_bytes = Scratch<T>(p, split, nullptr).bytes;
  char* const partials = static_cast<char*>(execution.workspace);
  char* const scratches = partials + split.schedule.size() * partial_bytes;
  const auto partial = [&](int64_t number) { return Partial<T>(p, split, partials + number * partial_bytes); };
  execution.parallel(split.schedule.size(), [&](int64_t number, int worker) {
    const Tile tile = split.schedule[number];
    const Scratch<T> scratch(p, split, scratches + worker * scratch_bytes);
    const Partial<T> result = partial(number);
    DecodeTask<T, S>(p, split, tile.batch, result, scratch).run(tile.block);
  });
  execution.parallel(p.batch, [&](int64_t batch, int worker) {
    const Scratch<T> scratch(p, split, scratches + worker * scratch_bytes);
    const int64_t first_chunk = first_block(split.schedule, batch);
    const Partial<T> first = partial(first_chunk);
    const DecodeTask<T, S> work(p, split, batch, first, scratch);
    for (int64_t chunk = 1; chunk < work.chunks(); ++chunk) work.join(partial(first_chunk + chunk));
    work.finish();
  });
}

}  // namespace

size_t decode_workspace(const Problem& p, int threads) { return workspace<float>(p, threads); }

void decode(const Problem& p, const Execution& execution) {
  with_storage<float>(p.dtype, [&](auto storage) { run_decode<float, decltype(storage)>(p, execution); });
}

}  // namespace fae::cpu::FAE_LEVEL
