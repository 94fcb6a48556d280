#include "bias_gradient.h"
#include "kernels.h"
#include "partials.h"
#include "recompute_tiles.h"
#include "split.h"
#include "statistics.h"

// Backward attention in bfloat16 on matrix tiles (FlashAttention-2, arXiv 2307.08691, algorithm 2), every option:
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = dS K,  dK = dS^T Q.
// A task (split.h) walks blocks of keys and, inside, blocks of queries, in steps of 32 keys by 32 queries. Every
// product has its operands in tiles: P and dS leave the recomputation (recompute_tiles.h) as tiles, the others are
// packed once per block. dK and dV are updated once per block of queries, dQ (transposed) once per block of keys.

namespace fae::cpu::FAE_LEVEL {
namespace {

int64_t largest_dim(const Problem& p) { return padded_dim(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v); }

// Keys and query rows packed at a time: long enough to make the traffic of dQ, dK and dV small, short enough to keep
// all of a task but its partial sums in the second-level cache (1.2 MB at head_dim 128).
int64_t keys_at_once(const Problem& p) {
  const int64_t keys = 65536 / largest_dim(p) / kBlock * kBlock;
  return keys > 512 ? 512 : keys;
}
int64_t rows_at_once(const Problem& p) { return largest_dim(p) <= 64 ? 256 : 128; }

struct Scratch {
  bfloat16 *k, *v, *k_transposed;                       // left tiles of the keys
  float *dk, *dv;                                       // [key][padded dim]
  bfloat16 *q_transposed, *dout_transposed, *q, *dout;  // right tiles of the query rows
  float *lse, *delta;                                   // of the query rows
  float* dq;                                            // [32 rows][padded dim][32], transposed
  bfloat16 *prob, *ds;                                  // left tiles: [32 rows] of 32 keys
  bfloat16* ds_right;                                   // right tiles: [32 keys][rows / 16]
  BlockScratch block;
  size_t bytes;

  Scratch(const Problem& p, void* base) : Scratch(p, Arena(base)) {}

 private:
  Scratch(const Problem& p, Arena arena) : block(arena) {
    const int64_t keys = keys_at_once(p), rows = rows_at_once(p);
    const int64_t dim = padded_dim(p.head_dim), dim_v = padded_dim(p.head_dim_v);
    k = arena.take<bfloat16>(keys * dim);
    v = arena.take<bfloat16>(keys * dim_v);
    k_transposed = arena.take<bfloat16>(keys * dim);
    dk = arena.take<float>(keys * dim);
    dv = arena.take<float>(keys * dim_v);
    q_transposed = arena.take<bfloat16>(rows * dim);
    dout_transposed = arena.take<bfloat16>(rows * dim_v);
    q = arena.take<bfloat16>(rows * dim);
    dout = arena.take<bfloat16>(rows * dim_v);
    lse = arena.take<float>(rows);
    delta = arena.take<float>(rows);
    dq = arena.take<float>(rows * dim);
    prob = arena.take<bfloat16>(rows * kBlock);
    ds = arena.take<bfloat16>(rows * kBlock);
    ds_right = arena.take<bfloat16>(rows * keys);
    bytes = arena.used();
  }
};

// The sum of `count` partial sums, `stride` elements apart, in their order.
FAE_INLINE Vec<float> sum_of(const float* partial, int64_t count, int64_t stride) {
  Vec<float> x = Vec<float>::load(partial);
  for (int64_t n = 1; n < count; ++n) x += Vec<float>::load(partial + n * stride);
  return x;
}

// dst = scale * the sum of partial sums whose rows are padded_dim(cols) long.
void write_rows(const float* partial, int64_t count, int64_t stride, int64_t rows, int64_t cols, float scale,
                const Rows& dst) {
  for (int64_t i = 0; i < rows; ++i, partial += padded_dim(cols))
    for (int64_t d = 0; d < cols; d += kTileSize)
      write_vector(sum_of(partial + d, count, stride) * scale, dst, i, d, cols);
}

// The same for one block of dQ, which lies transposed: [padded_dim(cols)][32].
void write_transposed(const float* partial, int64_t count, int64_t stride, int64_t rows, int64_t cols, float scale,
                      const Rows& dst) {
  for (int64_t row = 0; row < rows; row += kTileSize)
    for (int64_t d = 0; d < cols; d += kTileSize) {
      Vec<float> tile[kTileSize];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileSize; ++i) tile[i] = sum_of(partial + (d + i) * kBlock + row, count, stride) * scale;
      transpose<float>(tile);
      for (int64_t i = 0; i < kTileSize && row + i < rows; ++i) write_vector(tile[i], dst, row + i, d, cols);
    }
}

class BackwardTask {
 public:
  BackwardTask(const BackwardProblem& p, const BackwardSplit& split, const PairPartials<float>& partials,
               const Scratch& scratch, int64_t pair, int64_t pass, int64_t share, int64_t chunk)
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
        dim_(padded_dim(p.head_dim)),
        dim_v_(padded_dim(p.head_dim_v)) {}

  void run() {
    const Interval heads = split_.heads_of(pass_, share_);
    if (partials_.dq)
      for (int64_t member = heads.begin; member < heads.end; ++member)
        fill_zero(dq_partial(member), round_up(sequence_.seqlen_q, kBlock) * dim_);

    const int64_t begin = clamp_length(chunk_ * split_.chunk_keys, sequence_.seqlen_k);
    const int64_t end = clamp_length(begin + split_.chunk_keys, sequence_.seqlen_k);
    int64_t key = begin;
    do {  // at least once: a sequence without keys still writes dQ = 0
      const int64_t key_end = key + keys_at_once(p_) < end ? key + keys_at_once(p_) : end;
      pack_keys(key, key_end);
      for (int64_t member = heads.begin; member < heads.end; ++member) queries_against(member, key, key_end);
      if (!partials_.dk) write_dk_dv(key, key_end);
      key = key_end;
    } while (key < end);
  }

 private:
  static void fill_zero(float* x, int64_t n) { std::memset(x, 0, n * sizeof(float)); }

  Rows rows_of(const TensorView& view, int64_t row, int64_t head) const {
    return Rows(p_.dtype, view, batch_, row, head);
  }
  float* dq_partial(int64_t member) const {
    const int64_t number = member - split_.heads_of(pass_).begin;
    return partials_.dq + (chunk_ * split_.heads_at_once + number) * partials_.rows * dim_;
  }
  // Sums of dK and dV for the packed keys, the first of which is `key`.
  float* dk(int64_t key) const { return partials_.dk ? partials_.dk + dkv_row(key) * dim_ : scratch_.dk; }
  float* dv(int64_t key) const { return partials_.dv ? partials_.dv + dkv_row(key) * dim_v_ : scratch_.dv; }
  int64_t dkv_row(int64_t key) const { return share_ * partials_.keys + key; }

  void pack_keys(int64_t begin, int64_t end) const {
    const int64_t padded = round_up(end - begin, kBlock);
    const Matrix k(rows_of(p_.k, sequence_.k_start + begin, head_kv_), end - begin, p_.head_dim);
    const Matrix v(rows_of(p_.v, sequence_.k_start + begin, head_kv_), end - begin, p_.head_dim_v);
    pack_left(k, padded, scratch_.k);
    pack_left(v, padded, scratch_.v);
    pack_left_transposed(k, padded, scratch_.k_transposed);
    if (pass_ > 0) return;  // to which this one adds
    fill_zero(dk(begin), padded * dim_);
    fill_zero(dv(begin), padded * dim_v_);
  }

  void pack_queries(int64_t head, int64_t begin, int64_t end) const {
    const int64_t padded = round_up(end - begin, kBlock);
    const Matrix q(rows_of(p_.q, sequence_.q_start + begin, head), end - begin, p_.head_dim);
    const Matrix dout(rows_of(p_.dout, sequence_.q_start + begin, head), end - begin, p_.head_dim_v);
    pack_right_transposed(q, padded, scratch_.q_transposed);
    pack_right_transposed(dout, padded, scratch_.dout_transposed);
    pack_right(q, padded, scratch_.q);
    pack_right(dout, padded, scratch_.dout);
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t row = sequence_.q_start + begin + i;
      const bool inside = begin + i < end;
      scratch_.lse[i] = inside ? finite_max(*stats_ptr<float>(p_.lse, batch_, row, head)) : -minus_infinity<float>();
      scratch_.delta[i] = inside ? *stats_ptr<float>(p_.delta, batch_, row, head) : 0;
    }
  }

  // All queries of one head of the group against the packed keys [key_begin, key_end).
  void queries_against(int64_t member, int64_t key_begin, int64_t key_end) const {
    const int64_t head = head_kv_ * split_.group + member, step = rows_at_once(p_);
    const RecomputeTiles recompute(p_, batch_, head, sequence_, scratch_.block);
    // Where this task alone makes dQ it must also write the rows that see no key.
    const Interval rows = partials_.dq ? band_.rows_any(key_begin, key_end) : Interval{0, sequence_.seqlen_q};
    for (int64_t row = rows.begin / kBlock * kBlock; row < rows.end; row += step) {
      const int64_t end = row + step < sequence_.seqlen_q ? row + step : sequence_.seqlen_q;
      float* dq = partials_.dq ? dq_partial(member) + row * dim_ : scratch_.dq;
      if (!partials_.dq) fill_zero(dq, round_up(end - row, kBlock) * dim_);
      const Interval seen = band_.any(row, end);
      if (seen.begin < key_end && seen.end > key_begin) {
        pack_queries(head, row, end);
        for (int64_t key = key_begin; key < key_end; key += kBlock)
          if (key < seen.end && key + kBlock > seen.begin) add_dk_dv(recompute, row, end, key, key_begin);
        for (int64_t block = row; block < end; block += kBlock)
          add_dq(block, row, end, key_begin, key_end, dq + (block - row) * dim_);
      }
      if (!partials_.dq) write_dq(head, row, end);
    }
  }

  // P and dS of 32 keys and all query rows in [row_begin, row_end) that see them:  dV += P^T dO,  dK += dS^T Q.
  void add_dk_dv(const RecomputeTiles& recompute, int64_t row_begin, int64_t row_end, int64_t key,
                 int64_t key_begin) const {
    const int64_t at = key - key_begin;
    const Interval seeing = band_.rows_any(key, clamp_length(key + kBlock, sequence_.seqlen_k));
    const int64_t first = seeing.begin > row_begin ? (seeing.begin - row_begin) / kBlock * kBlock : 0;
    const int64_t last = round_up((seeing.end < row_end ? seeing.end : row_end) - row_begin, kBlock);
    const KeyBlock keys{key, scratch_.k + at * dim_, scratch_.v + at * dim_v_};
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t rows = row_end - row_begin - i < kBlock ? row_end - row_begin - i : kBlock;
      recompute({row_begin + i, rows, scratch_.q_transposed + i * dim_, scratch_.dout_transposed + i * dim_v_,
                 scratch_.lse + i, scratch_.delta + i},
                keys, {scratch_.prob + i * kBlock, scratch_.ds + i * kBlock, ds_right(at, i)});
    }
    add_product(scratch_.prob + first * kBlock, scratch_.dout + first * dim_v_, last - first, dim_v_,
                dv(key_begin) + at * dim_v_);
    add_product(scratch_.ds + first * kBlock, scratch_.q + first * dim_, last - first, dim_, dk(key_begin) + at * dim_);
  }

  // c[32 keys][dim] += A B with 32 keys by `rows` queries of A in left tiles and `rows` by dim of B in right tiles.
  static void add_product(const bfloat16* a, const bfloat16* b, int64_t rows, int64_t dim, float* c) {
    for (int64_t d = 0; d < dim; d += 2 * kTileSize, b += 2 * kTileElements)
      block_product<true>({a, kTileElements, 2 * kTileElements}, {b, kTileElements, kBlock * dim}, rows / kBlock, c + d,
                          dim);
  }

  // dQ^T += K^T dS^T for the 32 query rows at `row` of the block [row_begin, row_end) and the packed keys that they
  // see.
  void add_dq(int64_t row, int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end, float* dq) const {
    const Interval seen = band_.any(row, row + kBlock < row_end ? row + kBlock : row_end);
    const int64_t first = seen.begin > key_begin ? (seen.begin - key_begin) / kBlock * kBlock : 0;
    const int64_t last = round_up((seen.end < key_end ? seen.end : key_end) - key_begin, kBlock);
    if (seen.empty() || first >= last) return;
    const bfloat16 *k = scratch_.k_transposed + first * dim_, *ds = ds_right(first, row - row_begin);
    for (int64_t d = 0; d < dim_; d += 2 * kTileSize, k += 2 * kTileElements, dq += 2 * kTileSize * kBlock)
      block_product<true>({k, kTileElements, kBlock * dim_}, {ds, kTileElements, kBlock * rows_at_once(p_)},
                          (last - first) / kBlock, dq, kBlock);
  }

  // Right tiles of dS for 32 keys from packed key `key` on and 32 rows from packed row `row` on.
  bfloat16* ds_right(int64_t key, int64_t row) const {
    return scratch_.ds_right + key * rows_at_once(p_) + row * kBlock;
  }

  void write_dq(int64_t head, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row += kBlock)
      write_transposed(scratch_.dq + (row - begin) * dim_, 1, 0, end - row < kBlock ? end - row : kBlock, p_.head_dim,
                       static_cast<float>(p_.softmax_scale), rows_of(p_.dq, sequence_.q_start + row, head));
  }

  void write_dk_dv(int64_t begin, int64_t end) const {
    write_rows(scratch_.dk, 1, 0, end - begin, p_.head_dim, static_cast<float>(p_.softmax_scale),
               rows_of(p_.dk, sequence_.k_start + begin, head_kv_));
    write_rows(scratch_.dv, 1, 0, end - begin, p_.head_dim_v, 1.0f,
               rows_of(p_.dv, sequence_.k_start + begin, head_kv_));
  }

  const BackwardProblem& p_;
  const BackwardSplit& split_;
  const PairPartials<float>& partials_;
  const Scratch& scratch_;
  const int64_t batch_, head_kv_, pass_, share_, chunk_;
  const Sequence sequence_;
  const Band band_;
  const int64_t dim_, dim_v_;
};

// Adds the partial sums of a pass of the pairs [first_pair, last_pair) up, those of dK and dV after the last pass; a
// task does every so many blocks of 32 rows of dQ or keys of dK and dV.
void add_up(const BackwardProblem& p, const BackwardSplit& split, const Partials<float>& partials, int64_t first_pair,
            int64_t last_pair, int64_t pass, const Execution& execution) {
  const float scale = static_cast<float>(p.softmax_scale);
  const int64_t dim = padded_dim(p.head_dim), dim_v = padded_dim(p.head_dim_v), pairs = last_pair - first_pair;
  const auto rows_left = [](int64_t begin, int64_t length) { return clamp_length(length - begin, kBlock); };
  const Interval heads = split.heads_of(pass);
  if (partials.dq) {
    const int64_t shares = split.shares_of_sums(pairs * heads.size());
    execution.parallel(pairs * heads.size() * shares, [&](int64_t task, int) {
      const int64_t pair = first_pair + task / shares / heads.size(), number = task / shares % heads.size();
      const int64_t batch = pair / p.heads_kv;
      const int64_t head = pair % p.heads_kv * split.group + heads.begin + number;
      const Sequence s = sequence_of(p, batch);
      const PairPartials<float> mine(partials, split, first_pair, pair);
      const int64_t stride = split.heads_at_once * mine.rows * dim;
      for (int64_t row = task % shares * kBlock; row < s.seqlen_q; row += shares * kBlock)
        write_transposed(mine.dq + (number * mine.rows + row) * dim, split.chunks, stride, rows_left(row, s.seqlen_q),
                         p.head_dim, scale, Rows(p.dtype, p.dq, batch, s.q_start + row, head));
    });
  }
  if (partials.dk && pass == split.passes() - 1) {
    const int64_t shares = split.shares_of_sums(pairs);
    execution.parallel(pairs * shares, [&](int64_t task, int) {
      const int64_t pair = first_pair + task / shares, batch = pair / p.heads_kv, head = pair % p.heads_kv;
      const Sequence s = sequence_of(p, batch);
      const PairPartials<float> mine(partials, split, first_pair, pair);
      for (int64_t key = task % shares * kBlock; key < s.seqlen_k; key += shares * kBlock) {
        const int64_t keys = rows_left(key, s.seqlen_k);
        write_rows(mine.dk + key * dim, split.head_splits, mine.keys * dim, keys, p.head_dim, scale,
                   Rows(p.dtype, p.dk, batch, s.k_start + key, head));
        write_rows(mine.dv + key * dim_v, split.head_splits, mine.keys * dim_v, keys, p.head_dim_v, 1.0f,
                   Rows(p.dtype, p.dv, batch, s.k_start + key, head));
      }
    });
  }
}

// Everything that the workspace holds, and the cut it belongs to.
struct Plan {
  LongestSequence longest;
  BackwardSplit split;
  size_t scratch_bytes, bytes;
  StatsView delta;
  Partials<float> partials;
  char* scratch;

  Plan(const Problem& p, int threads, void* base)
      : longest(p),
        split(p, longest, kBlock, keys_at_once(p), padded_dim(p.head_dim) * sizeof(float),
              (padded_dim(p.head_dim) + padded_dim(p.head_dim_v)) * sizeof(float), threads),
        scratch_bytes(Scratch(p, nullptr).bytes),
        partials(split, padded_dim(p.head_dim), padded_dim(p.head_dim_v), nullptr) {
    Arena arena(base);
    delta = take_delta<float>(p, arena);
    partials = Partials<float>(split, partials.ld_qk, partials.ld_v, arena.take<char>(partials.bytes));
    const size_t bias_bytes = BiasGradient<float>::Scratch(p, nullptr).bytes;
    scratch = arena.take<char>(threads * (scratch_bytes > bias_bytes ? scratch_bytes : bias_bytes));
    bytes = arena.used();
  }
};

}  // namespace

size_t backward_workspace(const BackwardProblem& p, int threads) { return Plan(p, threads, nullptr).bytes; }

void backward(const BackwardProblem& problem, const Execution& execution) {
  BackwardProblem p = problem;
  const Plan plan(p, execution.threads, execution.workspace);
  const BackwardSplit& split = plan.split;
  p.delta = plan.delta;
  compute_delta<float>(p, plan.longest.q, execution);
  if (p.dsinks) compute_dsinks<float>(p, execution);
  if (p.dbias.data) compute_dbias<float>(p, execution, plan.scratch);

  for (int64_t first = 0, last; first < split.pairs; first = last) {
    last = split.round_end(first);
    for (int64_t pass = 0; pass < split.passes(); ++pass) {
      // Chunks outermost: under a causal mask the first chunks are the longest tasks.
      execution.parallel((last - first) * split.tasks_per_pair(), [&](int64_t task, int worker) {
        const Scratch scratch(p, plan.scratch + worker * plan.scratch_bytes);
        const int64_t pair = first + task % (last - first), part = task / (last - first);
        const PairPartials<float> partials(plan.partials, split, first, pair);
        const TileUnit tiles;
        BackwardTask(p, split, partials, scratch, pair, pass, part % split.head_splits, part / split.head_splits).run();
      });
      add_up(p, split, plan.partials, first, last, pass, execution);
    }
  }
}

}  // namespace fae::cpu::FAE_LEVEL
