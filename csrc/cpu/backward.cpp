#include "bias_gradient.h"
#include "gemm.h"
#include "kernels.h"
#include "pack.h"
#include "partials.h"
#include "recompute.h"
#include "split.h"
#include "statistics.h"

// Backward attention by recomputation (FlashAttention-2, arXiv 2307.08691, algorithm 2) for every type and option:
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = dS K,  dK = dS^T Q.
// A task (split.h) walks blocks of keys and, inside, blocks of queries; S and dP of one block pair stay in the cache
// for the three products that use them.

namespace fae::cpu::FAE_LEVEL {
namespace {

constexpr int64_t kBlockRows = 96;   // query rows at a time, whole strips
constexpr int64_t kPartialRows = 8;  // a short sequence's partial sums are little more than its own

// Keys packed at a time: what keeps K, V (transposed and straight) and dK, dV within the second-level cache.
template <class T>
int64_t keys_at_once(const Problem& p) {
  const int64_t dim = padded<T>(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v);
  const int64_t keys = 131072 / static_cast<int64_t>(sizeof(T)) / dim / kBlockKeys * kBlockKeys;
  return keys < kBlockKeys ? kBlockKeys : keys > 512 ? 512 : keys;
}

template <class T>
struct Scratch {
  T *k_transposed, *v_transposed, *k, *dk, *dv;  // of the packed keys
  T *q, *dout, *dq;                              // of the query block
  T *prob, *ds;                                  // [kBlockRows][kBlockKeys]
  T* cap_gradient;                               // [kStripRows][kBlockKeys]
  size_t bytes;

  Scratch(const Problem& p, void* base) {
    const int64_t keys = keys_at_once<T>(p), ld_qk = padded<T>(p.head_dim), ld_v = padded<T>(p.head_dim_v);
    Arena arena(base);
    k_transposed = arena.take<T>(keys * p.head_dim);
    v_transposed = arena.take<T>(keys * p.head_dim_v);
    k = arena.take<T>(keys * ld_qk);
    dk = arena.take<T>(keys * ld_qk);
    dv = arena.take<T>(keys * ld_v);
    q = arena.take<T>(kBlockRows * ld_qk);
    dout = arena.take<T>(kBlockRows * ld_v);
    dq = arena.take<T>(kBlockRows * ld_qk);
    prob = arena.take<T>(kBlockRows * kBlockKeys);
    ds = arena.take<T>(kBlockRows * kBlockKeys);
    cap_gradient = arena.take<T>(kStripRows * kBlockKeys);
    bytes = arena.used();
  }
};

template <class T>
class BackwardTask {
 public:
  BackwardTask(const BackwardProblem& p, const BackwardSplit& split, const PairPartials<T>& partials,
               const Scratch<T>& scratch, int64_t pair, int64_t pass, int64_t share, int64_t chunk)
      : p_(p),
        split_(split),
        partials_(partials),
        scratch_(scratch),
        batch_(pair / p.heads_kv),
        head_kv_(pair % p.heads_kv),
        pass_(pass),
        share_(share),
        chunk_(chunk),
        sequence_(sequence_of(p, batch_)),
        band_(band_of(p, sequence_)),
        ld_qk_(padded<T>(p.head_dim)),
        ld_v_(padded<T>(p.head_dim_v)) {}

  void run() {
    const Interval heads = split_.heads_of(pass_, share_);
    if (partials_.dq)
      for (int64_t member = heads.begin; member < heads.end; ++member)
        fill_zero(dq_partial(member, 0), sequence_.seqlen_q * ld_qk_);

    const int64_t begin = clamp_length(chunk_ * split_.chunk_keys, sequence_.seqlen_k);
    const int64_t end = clamp_length(begin + split_.chunk_keys, sequence_.seqlen_k);
    int64_t key = begin;
    do {  // at least once: a sequence without keys still writes dQ = 0
      const int64_t key_end = key + keys_at_once<T>(p_) < end ? key + keys_at_once<T>(p_) : end;
      pack_keys(key, key_end);
      for (int64_t member = heads.begin; member < heads.end; ++member)
        queries_against(head_kv_ * split_.group + member, member, key, key_end);
      write_dk_dv(key, key_end);
      key = key_end;
    } while (key < end);
  }

 private:
  static constexpr int W = Vec<T>::width;

  static void fill_zero(T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
  }
  Rows rows_of(const TensorView& view, int64_t row, int64_t head) const {
    return Rows(p_.dtype, view, batch_, row, head);
  }
  T* dq_partial(int64_t member, int64_t row) const {
    const int64_t number = member - split_.heads_of(pass_).begin;
    return partials_.dq + ((chunk_ * split_.heads_at_once + number) * partials_.rows + row) * ld_qk_;
  }

  T* dk_partial(int64_t key) const { return partials_.dk + dkv_row(key) * ld_qk_; }
  T* dv_partial(int64_t key) const { return partials_.dv + dkv_row(key) * ld_v_; }
  int64_t dkv_row(int64_t key) const { return share_ * partials_.keys + key; }

  void pack_keys(int64_t begin, int64_t end) const {
    for (int64_t key = begin; key < end; key += kBlockKeys) {
      const int64_t count = end - key < kBlockKeys ? end - key : kBlockKeys;
      const Rows k = rows_of(p_.k, sequence_.k_start + key, head_kv_);
      const Rows v = rows_of(p_.v, sequence_.k_start + key, head_kv_);
      const int64_t at = key - begin;
      pack_transposed<T>(k, count, p_.head_dim, static_cast<T>(p_.softmax_scale),
                         scratch_.k_transposed + at * p_.head_dim, kBlockKeys);
      pack_transposed<T>(v, count, p_.head_dim_v, T(1), scratch_.v_transposed + at * p_.head_dim_v, kBlockKeys);
      pack_rows<T>(k, count, p_.head_dim, T(1), scratch_.k + at * ld_qk_);
    }
    if (pass_ == 0) {
      fill_zero(scratch_.dk, (end - begin) * ld_qk_);
      fill_zero(scratch_.dv, (end - begin) * ld_v_);
    } else {
      std::memcpy(scratch_.dk, dk_partial(begin), (end - begin) * ld_qk_ * sizeof(T));
      std::memcpy(scratch_.dv, dv_partial(begin), (end - begin) * ld_v_ * sizeof(T));
    }
  }

  // All queries of one head against the packed keys [key_begin, key_end).
  void queries_against(int64_t head, int64_t member, int64_t key_begin, int64_t key_end) {
    const Recompute<T> recompute(p_, batch_, head);
    // Where this task alone makes dQ it must also write the rows that see no key.
    const Interval rows = partials_.dq ? band_.rows_any(key_begin, key_end) : Interval{0, sequence_.seqlen_q};
    for (int64_t row = rows.begin / kBlockRows * kBlockRows; row < rows.end; row += kBlockRows) {
      const int64_t end = row + kBlockRows < sequence_.seqlen_q ? row + kBlockRows : sequence_.seqlen_q;
      pack_rows<T>(rows_of(p_.q, sequence_.q_start + row, head), end - row, p_.head_dim, T(1), scratch_.q);
      pack_rows<T>(rows_of(p_.dout, sequence_.q_start + row, head), end - row, p_.head_dim_v, T(1), scratch_.dout);
      fill_zero(scratch_.dq, (end - row) * ld_qk_);
      const Interval keys = band_.any(row, end);
      for (int64_t key = key_begin; key < key_end; key += kBlockKeys) {
        prefetch_next_rows(head, end, key - key_begin, key_end - key_begin);
        if (key < keys.end && key + kBlockKeys > keys.begin) block(recompute, row, end, key, key - key_begin);
      }
      write_dq(head, member, row, end);
    }
  }

  // Spreads the prefetch of the next query block over the key blocks of this one.
  void prefetch_next_rows(int64_t head, int64_t row, int64_t at, int64_t keys) const {
    const int64_t begin = row + at * kBlockRows / keys, end = row + (at + kBlockKeys) * kBlockRows / keys;
    const int64_t last = end < sequence_.seqlen_q ? end : sequence_.seqlen_q;
    prefetch_rows(rows_of(p_.q, sequence_.q_start, head), begin, last, p_.head_dim);
    prefetch_rows(rows_of(p_.dout, sequence_.q_start, head), begin, last, p_.head_dim_v);
  }

  // Query rows [row_begin, row_end) against the key block at `key`, packed at `at`.
  void block(const Recompute<T>& recompute, int64_t row_begin, int64_t row_end, int64_t key, int64_t at) {
    const Interval seeing = band_.rows_any(key, key + kBlockKeys);
    const int64_t first = seeing.begin > row_begin ? (seeing.begin - row_begin) / kStripRows * kStripRows : 0;
    const int64_t last = (seeing.end < row_end ? seeing.end : row_end) - row_begin;
    for (int64_t row = first; row < last; row += kStripRows) {
      const int64_t rows = last - row < kStripRows ? last - row : kStripRows;
      recompute({scratch_.q + row * ld_qk_, scratch_.dout + row * ld_v_, scratch_.k_transposed + at * p_.head_dim,
                 scratch_.v_transposed + at * p_.head_dim_v},
                row_begin + row, rows, key, scratch_.prob + row * kBlockKeys, scratch_.ds + row * kBlockKeys,
                scratch_.cap_gradient);
    }
    const T* k = scratch_.k + at * ld_qk_;
    const T *q = scratch_.q + first * ld_qk_, *dout = scratch_.dout + first * ld_v_;
    const T *prob = scratch_.prob + first * kBlockKeys, *ds = scratch_.ds + first * kBlockKeys;
    const Interval seen = band_.any(row_begin + first, row_begin + last);
    const int64_t key_first = seen.begin > key ? seen.begin - key : 0;
    const int64_t key_last = seen.end - key < kBlockKeys ? seen.end - key : kBlockKeys;
    const int64_t keys = key_last - key_first, rows = last - first;
    // dV += P^T dO,  dK += dS^T Q,  dQ += dS K
    gemm<T>({.a = prob + key_first,
             .a_row = 1,
             .a_k = kBlockKeys,
             .b = dout,
             .ldb = ld_v_,
             .c = scratch_.dv + (at + key_first) * ld_v_,
             .ldc = ld_v_,
             .rows = keys,
             .cols = ld_v_,
             .depth = rows,
             .accumulate = true});
    gemm<T>({.a = ds + key_first,
             .a_row = 1,
             .a_k = kBlockKeys,
             .b = q,
             .ldb = ld_qk_,
             .c = scratch_.dk + (at + key_first) * ld_qk_,
             .ldc = ld_qk_,
             .rows = keys,
             .cols = ld_qk_,
             .depth = rows,
             .accumulate = true});
    gemm<T>({.a = ds + key_first,
             .a_row = kBlockKeys,
             .a_k = 1,
             .b = k + key_first * ld_qk_,
             .ldb = ld_qk_,
             .c = scratch_.dq + first * ld_qk_,
             .ldc = ld_qk_,
             .rows = rows,
             .cols = ld_qk_,
             .depth = keys,
             .accumulate = true});
  }

  void write_dq(int64_t head, int64_t member, int64_t row, int64_t end) const {
    if (!partials_.dq)
      return unpack_rows<T>(scratch_.dq, end - row, p_.head_dim, static_cast<T>(p_.softmax_scale),
                            rows_of(p_.dq, sequence_.q_start + row, head));
    T* partial = dq_partial(member, row);
    for (int64_t i = 0; i < (end - row) * ld_qk_; i += W)
      (Vec<T>::load(partial + i) + Vec<T>::load(scratch_.dq + i)).store(partial + i);
  }

  void write_dk_dv(int64_t begin, int64_t end) const {
    if (!partials_.dk) {
      unpack_rows<T>(scratch_.dk, end - begin, p_.head_dim, static_cast<T>(p_.softmax_scale),
                     rows_of(p_.dk, sequence_.k_start + begin, head_kv_));
      return unpack_rows<T>(scratch_.dv, end - begin, p_.head_dim_v, T(1),
                            rows_of(p_.dv, sequence_.k_start + begin, head_kv_));
    }
    std::memcpy(dk_partial(begin), scratch_.dk, (end - begin) * ld_qk_ * sizeof(T));
    std::memcpy(dv_partial(begin), scratch_.dv, (end - begin) * ld_v_ * sizeof(T));
  }

  const BackwardProblem& p_;
  const BackwardSplit& split_;
  const PairPartials<T>& partials_;
  const Scratch<T>& scratch_;
  const int64_t batch_, head_kv_, pass_, share_, chunk_;
  const Sequence sequence_;
  const Band band_;
  const int64_t ld_qk_, ld_v_;
};

// dst = scale * sum of `count` partial sums, `stride` elements apart, in their order.
template <class T>
void add_partials(T* partial, int64_t count, int64_t stride, int64_t rows, int64_t cols, T scale, const Rows& dst) {
  for (int64_t n = 1; n < count; ++n)
    for (int64_t i = 0; i < rows * padded<T>(cols); i += Vec<T>::width)
      (Vec<T>::load(partial + i) + Vec<T>::load(partial + n * stride + i)).store(partial + i);
  unpack_rows<T>(partial, rows, cols, scale, dst);
}

// Adds the partial sums of a pass of the pairs [first_pair, last_pair) up, those of dK and dV after the last pass; a
// task does every so many blocks of rows of dQ, or of dK and dV.
template <class T>
void add_up(const BackwardProblem& p, const BackwardSplit& split, const Partials<T>& partials, int64_t first_pair,
            int64_t last_pair, int64_t pass, const Execution& execution) {
  constexpr int64_t kRows = 128;
  const int64_t ld_qk = padded<T>(p.head_dim), ld_v = padded<T>(p.head_dim_v);
  const int64_t pairs = last_pair - first_pair;
  const auto clipped = [](int64_t begin, int64_t length) { return clamp_length(length - begin, kRows); };
  if (partials.dq) {
    const Interval heads = split.heads_of(pass);
    const int64_t shares = split.shares_of_sums(pairs * heads.size());
    execution.parallel(pairs * heads.size() * shares, [&](int64_t task, int) {
      const int64_t pair = first_pair + task / shares / heads.size(), number = task / shares % heads.size();
      const int64_t batch = pair / p.heads_kv;
      const int64_t head = pair % p.heads_kv * split.group + heads.begin + number;
      const Sequence s = sequence_of(p, batch);
      const PairPartials<T> mine(partials, split, first_pair, pair);
      const int64_t stride = split.heads_at_once * mine.rows * ld_qk;
      for (int64_t row = task % shares * kRows; row < s.seqlen_q; row += shares * kRows)
        add_partials(mine.dq + (number * mine.rows + row) * ld_qk, split.chunks, stride, clipped(row, s.seqlen_q),
                     p.head_dim, static_cast<T>(p.softmax_scale), Rows(p.dtype, p.dq, batch, s.q_start + row, head));
    });
  }
  if (partials.dk && pass == split.passes() - 1) {
    const int64_t shares = split.shares_of_sums(pairs);
    execution.parallel(pairs * shares, [&](int64_t task, int) {
      const int64_t pair = first_pair + task / shares, batch = pair / p.heads_kv, head = pair % p.heads_kv;
      const Sequence s = sequence_of(p, batch);
      const PairPartials<T> mine(partials, split, first_pair, pair);
      for (int64_t key = task % shares * kRows; key < s.seqlen_k; key += shares * kRows) {
        const int64_t rows = clipped(key, s.seqlen_k);
        add_partials(mine.dk + key * ld_qk, split.head_splits, mine.keys * ld_qk, rows, p.head_dim,
                     static_cast<T>(p.softmax_scale), Rows(p.dtype, p.dk, batch, s.k_start + key, head));
        add_partials(mine.dv + key * ld_v, split.head_splits, mine.keys * ld_v, rows, p.head_dim_v, T(1),
                     Rows(p.dtype, p.dv, batch, s.k_start + key, head));
      }
    });
  }
}

// Everything that the workspace holds and the cut it belongs to.
template <class T>
struct Plan {
  LongestSequence longest;
  BackwardSplit split;
  size_t scratch_bytes, bytes;
  StatsView delta;
  Partials<T> partials;
  char* scratch;

  Plan(const Problem& p, int threads, void* base)
      : longest(p),
        split(p, longest, kPartialRows, keys_at_once<T>(p), padded<T>(p.head_dim) * sizeof(T),
              (padded<T>(p.head_dim) + padded<T>(p.head_dim_v)) * sizeof(T), threads),
        scratch_bytes(Scratch<T>(p, nullptr).bytes),
        partials(split, padded<T>(p.head_dim), padded<T>(p.head_dim_v), nullptr) {
    Arena arena(base);
    delta = take_delta<T>(p, arena);
    partials = Partials<T>(split, partials.ld_qk, partials.ld_v, arena.take<char>(partials.bytes));
    const size_t bias_bytes = typename BiasGradient<T>::Scratch(p, nullptr).bytes;
    scratch = arena.take<char>(threads * (scratch_bytes > bias_bytes ? scratch_bytes : bias_bytes));
    bytes = arena.used();
  }
};

template <class T>
void run_backward(BackwardProblem p, const Execution& execution) {
  const Plan<T> plan(p, execution.threads, execution.workspace);
  const BackwardSplit& split = plan.split;
  p.delta = plan.delta;
  compute_delta<T>(p, plan.longest.q, execution);
  if (p.dsinks) compute_dsinks<T>(p, execution);
  if (p.dbias.data) compute_dbias<T>(p, execution, plan.scratch);

  const int64_t tasks = split.tasks_per_pair();
  for (int64_t first = 0, last; first < split.pairs; first = last) {
    last = split.round_end(first);
    for (int64_t pass = 0; pass < split.passes(); ++pass) {
      // Chunks outermost: under a causal mask the first chunks are the longest tasks.
      execution.parallel((last - first) * tasks, [&](int64_t task, int worker) {
        const Scratch<T> scratch(p, plan.scratch + worker * plan.scratch_bytes);
        const int64_t pair = first + task % (last - first), part = task / (last - first);
        const PairPartials<T> partials(plan.partials, split, first, pair);
        BackwardTask<T>(p, split, partials, scratch, pair, pass, part % split.head_splits, part / split.head_splits)
            .run();
      });
      add_up(p, split, plan.partials, first, last, pass, execution);
    }
  }
}

}  // namespace

size_t backward_workspace(const BackwardProblem& p, int threads) {
  return p.dtype == DType::float64 ? Plan<double>(p, threads, nullptr).bytes : Plan<float>(p, threads, nullptr).bytes;
}

void backward(const BackwardProblem& p, const Execution& execution) {
  p.dtype == DType::float64 ? run_backward<double>(p, execution) : run_backward<float>(p, execution);
}

}  // namespace fae::cpu::FAE_LEVEL
