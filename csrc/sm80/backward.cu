#include "../core/schedule.h"
#include "../cuda/delta.h"
#include "../cuda/launch.h"
#include "kernels.h"
#include "recompute.h"

// Backward attention by recomputation (FlashAttention-2, arXiv 2307.08691, algorithm 2) with mma.sync:
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = dS K,  dK = dS^T Q.
// A thread block keeps a block of keys of one KV head, and dK and dV of it in registers, while it walks the query
// blocks of the heads that share those keys. P and dS pass from warp to warp through shared memory.
//
// dQ of a query block is a sum over the key blocks that see it ("visitors"). It grows in global memory, and visitors
// take turns in the order of their keys, so that it has the same bits every time: the first one stores, others add, and
// the last one writes the result. Nothing has to be set to zero, and nothing to be converted afterwards. All key blocks
// walk the queries from the end, so that each follows its predecessor at a distance and finds its turn come. A thread
// block only ever waits for blocks that have drawn a lower ticket, which are running or done: there is no deadlock.

namespace fae::sm80 {
namespace {

// One call: the problem and what the host has worked out about it.
struct BackwardCall {
  BackwardProblem p;
  GridSchedule key_blocks;    // (batch, KV head, block of keys)
  PackedBlocks query_blocks;  // packed tensors
  int64_t query_blocks_per_head;
  unsigned long long* ticket;
  int* turns;         // [head or batch x head][query block]: visitors that are done
  float* dq_partial;  // the same, by a block's sums in the order of the threads that hold them
  bool q_whole_vectors, k_whole_vectors, v_whole_vectors, dout_whole_vectors;
  bool direct_dbias;
  Precision precision;
};

template <class T, class Config>
struct BackwardMemory {
  using K = typename ScoreOperands<T, Config>::Keys;
  using Q = typename ScoreOperands<T, Config>::Rows;
  using P = SharedTile<T, Config::kRows, Config::kKeys>;
  static constexpr int kStatsBytes = Config::kRows * 8;
  static constexpr int kStageBytes = 2 * Q::kBytes;
  static constexpr int kStats = 2 * K::kBytes + Config::kStages * kStageBytes + 2 * P::kBytes;
  static constexpr int kTicket = kStats + Config::kStages * kStatsBytes;
  static constexpr int kBytes = kTicket + 8;

  uint32_t base;

  __device__ K k() const { return {base}; }
  __device__ K v() const { return {base + K::kBytes}; }
  __device__ Q q(int stage) const { return {base + 2 * K::kBytes + stage * kStageBytes}; }
  __device__ Q dout(int stage) const { return {base + 2 * K::kBytes + stage * kStageBytes + Q::kBytes}; }
  __device__ P p() const { return {base + 2 * K::kBytes + Config::kStages * kStageBytes}; }
  __device__ P ds() const { return {base + 2 * K::kBytes + Config::kStages * kStageBytes + P::kBytes}; }
  __device__ uint32_t lse(int stage) const { return base + kStats + stage * kStatsBytes; }
  __device__ uint32_t delta(int stage) const { return lse(stage) + Config::kRows * 4; }
  __device__ ScoreOperands<T, Config> operands(int stage) const {
    return {q(stage), dout(stage), k(), v(), lse(stage), delta(stage)};
  }
};

// Warps along `cols` columns beside so many along the rows: as many as there are and divide the columns.
template <class Config>
constexpr int col_warps(int row_warps, int cols) {
  int warps = Config::kWarps / row_warps;
  while (cols % (16 * warps) != 0) --warps;
  return warps;
}

template <class Config>
using KeyWarps = WarpPlace<Config, Config::kKeys, Config::kDim, Config::kKeyRowWarps,
                           col_warps<Config>(Config::kKeyRowWarps, Config::kDim)>;
template <class Config>
using QueryWarps = WarpPlace<Config, Config::kRows, Config::kDim, Config::kQueryRowWarps,
                             col_warps<Config>(Config::kQueryRowWarps, Config::kDim)>;

// Of a query block: what all threads hold of its dQ.
template <class Config>
constexpr int64_t kPartialFloats = QueryWarps<Config>::M * QueryWarps<Config>::N * 4 * Config::kThreads;

template <class T, class Config, bool kGeneral>
class BackwardTask {
  using Memory = BackwardMemory<T, Config>;
  using KeyPlace = KeyWarps<Config>;
  using QueryPlace = QueryWarps<Config>;
  using KeyGradient = Accumulator<KeyPlace::M, KeyPlace::N>;
  using QueryGradient = Accumulator<QueryPlace::M, QueryPlace::N>;

 public:
  __device__ BackwardTask(const BackwardCall& call, const Tile& tile, const Sequence& sequence)
      : call_(call),
        p_(call.p),
        batch_(static_cast<int>(tile.batch)),
        head_kv_(static_cast<int>(tile.head)),
        block_(static_cast<int>(tile.block)),
        sequence_(sequence),
        band_(sequence.seqlen_q, sequence.seqlen_k, p_.window_left, p_.window_right),
        memory_{shared_offset(dynamic_shared_memory())} {
    const auto rows = band_.rows_any(key_begin(), min(key_begin() + Config::kKeys, band_.seqlen_k));
    if (rows.empty()) return;
    first_rows_ = rows.begin / Config::kRows;
    last_rows_ = ceil_div(rows.end, Config::kRows) - 1;
  }

  __device__ void run() {
    const int rows = band_.seqlen_k - key_begin();
    copy_rows<Config::kThreads>(memory_.k(), GlobalRows<T>(p_.k, batch_, sequence_.k_start + key_begin(), head_kv_,
                                                           rows, p_.head_dim, 0, call_.k_whole_vectors));
    copy_rows<Config::kThreads>(memory_.v(), GlobalRows<T>(p_.v, batch_, sequence_.k_start + key_begin(), head_kv_,
                                                           rows, p_.head_dim_v, 0, call_.v_whole_vectors));
    dk_.fill(0);
    dv_.fill(0);
    const int group = static_cast<int>(p_.heads / p_.heads_kv);
    const Step end{(head_kv_ + 1) * group, last_rows_};
    Step step{head_kv_ * group, last_rows_};
    if (first_rows_ > last_rows_) step = end;
    copy_queries(step, end, 0);
    int stage = 0;
#pragma unroll 1
    for (; step.head < end.head; step = after(step)) {
      visit(step, end, stage);
      stage = (stage + 1) % Config::kStages;
    }
    wait_copies<0>();  // nothing may arrive after this block
    pass_turn();
    write(dk_, p_.dk, static_cast<int>(p_.head_dim), static_cast<float>(p_.softmax_scale));
    write(dv_, p_.dv, static_cast<int>(p_.head_dim_v), 1.0f);
  }

 private:
  // A query block of a head.
  struct Step {
    int head, block;
  };
  __device__ Step after(const Step& step) const {
    return step.block > first_rows_ ? Step{step.head, step.block - 1} : Step{step.head + 1, last_rows_};
  }
  __device__ int key_begin() const { return block_ * Config::kKeys; }

  // Starts the copy of Q, dO, lse and delta, in a group of its own (which is empty past the last step).
  __device__ void copy_queries(const Step& step, const Step& end, int stage) const {
    if (step.head < end.head) {
      const int begin = step.block * Config::kRows, rows = band_.seqlen_q - begin;
      const int64_t row = sequence_.q_start + begin;
      copy_rows<Config::kThreads>(
          memory_.q(stage), GlobalRows<T>(p_.q, batch_, row, step.head, rows, p_.head_dim, 0, call_.q_whole_vectors));
      copy_rows<Config::kThreads>(memory_.dout(stage), GlobalRows<T>(p_.dout, batch_, row, step.head, rows,
                                                                     p_.head_dim_v, 0, call_.dout_whole_vectors));
      if (const int i = static_cast<int>(threadIdx.x); i < Config::kRows) {
        const bool valid = i < rows;
        const int from = valid ? i : 0;
        copy_4_bytes(memory_.lse(stage) + i * 4, stats_ptr<float>(p_.lse, batch_, row + from, step.head), valid);
        copy_4_bytes(memory_.delta(stage) + i * 4, stats_ptr<float>(p_.delta, batch_, row + from, step.head), valid);
      }
    }
    commit_copies();
  }

  // One query block: its share of dK and dV, and this block's share of its dQ.
  __device__ __forceinline__ void visit(const Step& step, const Step& end, int stage) {
    wait_copies<0>();
    __syncthreads();
    pass_turn();
    if constexpr (Config::kStages > 1) copy_queries(after(step), end, 1 - stage);
    if (ScoreWarps<Config>::exists()) recompute(step, stage);
    const Visit turn = visit_of(step);
    if (threadIdx.x == 0 && turn.rank > 0)
      while (load_acquire(turn.done) < turn.rank) {
      }
    __syncthreads();

    if (QueryPlace::exists()) {
      QueryGradient dq;
      dq.fill(0);
      multiply_operands<Config::kKeys>(
          dq, StraightOperand<typename Memory::P, Side::left>(memory_.ds(), QueryPlace().row),
          TransposedOperand<typename Memory::K, Side::right>(memory_.k(), QueryPlace().col));  // dS K
      add_to_dq(dq, step, turn);
    }
    to_pass_ = turn.rank + 1 < turn.visitors ? turn.done : nullptr;
    passed_ = turn.rank;
    if (KeyPlace::exists()) {
      multiply_operands<Config::kRows>(
          dv_, TransposedOperand<typename Memory::P, Side::left>(memory_.p(), KeyPlace().row),
          TransposedOperand<typename Memory::Q, Side::right>(memory_.dout(stage), KeyPlace().col));  // P^T dO
      multiply_operands<Config::kRows>(
          dk_, TransposedOperand<typename Memory::P, Side::left>(memory_.ds(), KeyPlace().row),
          TransposedOperand<typename Memory::Q, Side::right>(memory_.q(stage), KeyPlace().col));  // dS^T Q
    }
    if constexpr (Config::kStages == 1) {
      __syncthreads();
      copy_queries(after(step), end, 0);
    }
  }

  template <int kDepth, int M, int N, class Left, class Right>
  __device__ __forceinline__ void multiply_operands(Accumulator<M, N>& x, const Left& left, const Right& right) const {
    multiply<kDepth / kStepDepth<T>>(x, [&](int m, int k) { return left.left(m, k); }, right, call_.precision);
  }

  // P and dS of the warp's rows and keys, into shared memory.
  __device__ __forceinline__ void recompute(const Step& step, int stage) const {
    using Recompute = sm80::Recompute<T, Config, kGeneral>;
    const ScoreWarps<Config> place;
    const int row = step.block * Config::kRows;
    typename Recompute::Scores prob, ds;
    Recompute(p_, batch_, step.head, band_, call_.precision)(
        memory_.operands(stage), row, key_begin(), prob, ds, [&](int m, int half, int n, int e, float x) {
          if (call_.direct_dbias)
            write_dbias(step.head, row + place.row + prob.row(m, half), key_begin() + place.col + prob.col(n, e), x);
        });
    prob.for_each_row([&](int m, int half) {
      const int r = place.row + prob.row(m, half);
#pragma unroll
      for (int n = 0; n < ScoreWarps<Config>::N; ++n) {
        const int c = place.col + prob.col(n, 0);
        store_pair(memory_.p(), r, c, prob.at(m, half, n, 0), prob.at(m, half, n, 1));
        store_pair(memory_.ds(), r, c, ds.at(m, half, n, 0), ds.at(m, half, n, 1));
      }
    });
  }

  // Where every element of bias belongs to one score, its gradient is that score's.
  __device__ __forceinline__ void write_dbias(int head, int row, int key, float x) const {
    if (row >= min(band_.seqlen_q, static_cast<int>(p_.dbias.size_row)) ||
        key >= min(band_.seqlen_k, static_cast<int>(p_.dbias.size_col)))
      return;
    const int64_t offset = score_offset(p_.dbias, batch_, head, row, key);
    if (p_.dbias.dtype == DType::float32)
      static_cast<float*>(p_.dbias.data)[offset] = x;
    else
      static_cast<T*>(p_.dbias.data)[offset] = T(x);
  }

  // ---- dQ, in turns -------------------------------------------------------------------------------------------------

  struct Visit {
    int rank, visitors;
    int* done;
    float* partial;
  };
  __device__ Visit visit_of(const Step& step) const {
    const int begin = step.block * Config::kRows;
    const auto keys = band_.any(begin, min(begin + Config::kRows, band_.seqlen_q));
    const int first = keys.begin / Config::kKeys;
    const int64_t block = call_.query_blocks.cu_seqlens
                              ? call_.query_blocks.first(batch_) + step.block
                              : static_cast<int64_t>(batch_) * call_.p.heads * call_.query_blocks_per_head + step.block;
    const int64_t slot = step.head * call_.query_blocks_per_head + block;
    return {block_ - first, ceil_div(keys.end, Config::kKeys) - first, call_.turns + slot,
            call_.dq_partial + slot * kPartialFloats<Config>};
  }

  __device__ __forceinline__ void add_to_dq(QueryGradient& dq, const Step& step, const Visit& turn) {
    const QueryPlace place;
    const bool last = turn.rank == turn.visitors - 1;
    float4* const partial = reinterpret_cast<float4*>(turn.partial) + threadIdx.x;
#pragma unroll
    for (int m = 0; m < QueryPlace::M; ++m)
#pragma unroll
      for (int n = 0; n < QueryPlace::N; ++n) {
        float (&x)[4] = dq.x[m][n];
        float4* const sum = partial + (m * QueryPlace::N + n) * Config::kThreads;
        if (turn.rank == 0 && !last) {
          *sum = {x[0], x[1], x[2], x[3]};
        } else if (!last) {
          add_to_global(reinterpret_cast<float*>(sum), x);
        } else if (turn.rank > 0) {
          const float4 before = __ldcg(sum);
          x[0] += before.x, x[1] += before.y, x[2] += before.z, x[3] += before.w;
        }
      }
    if (!last) return;
    const int row = step.block * Config::kRows + place.row;
    write_rows(dq, p_.dq, sequence_.q_start + row, step.head, band_.seqlen_q - row, place.col,
               static_cast<int>(p_.head_dim), static_cast<float>(p_.softmax_scale));
  }

  // Lets the next visitor of the query block of the last step begin. All threads have added their share by then.
  __device__ __forceinline__ void pass_turn() {
    if (threadIdx.x == 0 && to_pass_) store_release(to_pass_, passed_ + 1);
    to_pass_ = nullptr;
  }

  // ---- Results ------------------------------------------------------------------------------------------------------

  __device__ void write(const KeyGradient& x, const TensorView& view, int head_dim, float scale) const {
    const KeyPlace place;
    const int row = key_begin() + place.row;
    write_rows(x, view, sequence_.k_start + row, head_kv_, band_.seqlen_k - row, place.col, head_dim, scale);
  }

  // scale * x, an accumulator whose first element belongs to (row, col); `rows` of them exist.
  template <int M, int N>
  __device__ __forceinline__ void write_rows(const Accumulator<M, N>& x, const TensorView& view, int64_t row, int head,
                                             int rows, int col, int cols, float scale) const {
    x.for_each_row([&](int m, int half) {
      const int r = x.row(m, half);
      if (r >= rows) return;
      T* const to = row_ptr<T>(view, batch_, row + r, head);
#pragma unroll
      for (int n = 0; n < N; ++n)
        store_pair(to, col + x.col(n, 0), cols, x.at(m, half, n, 0) * scale, x.at(m, half, n, 1) * scale);
    });
  }

  const BackwardCall& call_;
  const BackwardProblem& p_;
  const int batch_, head_kv_, block_;
  const Sequence sequence_;
  const cuda::DeviceBand band_;
  const Memory memory_;
  int first_rows_ = 0, last_rows_ = -1;  // query blocks that see any of the keys
  int* to_pass_ = nullptr;               // the turn that this block has had and not passed on
  int passed_ = 0;
  KeyGradient dk_, dv_;
};

template <class T, class Config, bool kGeneral>
__global__ void __launch_bounds__(Config::kThreads) backward_kernel(const __grid_constant__ BackwardCall call) {
  auto* const ticket =
      reinterpret_cast<unsigned long long*>(dynamic_shared_memory() + BackwardMemory<T, Config>::kTicket);
  if (threadIdx.x == 0) *ticket = atomicAdd(call.ticket, 1ull);
  __syncthreads();
  const Tile tile = call.key_blocks[static_cast<uint32_t>(*ticket)];
  const Sequence sequence = sequence_of(call.p, tile.batch);
  if (tile.block < 0 || tile.block * Config::kKeys >= sequence.seqlen_k) return;
  BackwardTask<T, Config, kGeneral>(call, tile, sequence).run();
}

// ---- Host
// --------------------------------------------------------------------------------------------------------------

// Thread blocks that run at the same time on a large GPU. Consecutive key blocks of a head run together and share the
// queries in the second-level cache.
constexpr int64_t kConcurrentBlocks = 128;

// The parts of the workspace.
template <class Config>
struct BackwardSpace {
  int64_t query_blocks, heads;
  StatsView delta;
  int* counters;  // the ticket, then the turns
  int64_t counter_count;
  int32_t *cu_seqlens_q, *cu_seqlens_k;
  float* dq_partial;
  void* bias_gradient;
  size_t bytes = 0;

  BackwardSpace(const BackwardProblem& p, void* base) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const PackedBlocks blocks(p.cu_seqlens_q, p.batch, p.total_q, Config::kRows);
    query_blocks = packed ? blocks.size() : ceil_div(p.max_seqlen_q, Config::kRows);
    heads = packed ? p.heads : p.batch * p.heads;
    const int64_t rows = packed ? p.total_q : p.max_seqlen_q;
    delta.data = take<float>(base, heads * rows);
    delta.stride_batch = packed ? 0 : p.heads * rows;
    delta.stride_head = rows;
    counter_count = 2 + heads * query_blocks;
    counters = take<int>(base, counter_count);
    cu_seqlens_q = packed ? take<int32_t>(base, p.batch + 1) : nullptr;
    cu_seqlens_k = packed ? take<int32_t>(base, p.batch + 1) : nullptr;
    // Where one block has all keys, dQ never leaves the registers unfinished.
    const bool alone = (packed ? p.total_k : p.max_seqlen_k) <= Config::kKeys;
    dq_partial = take<float>(base, alone ? 0 : heads * query_blocks * kPartialFloats<Config>);
    const bool pass = p.dbias.data && broadcasts(p, p.dbias);
    bias_gradient = take<char>(base, pass ? static_cast<int64_t>(bias_gradient_workspace<FAE_HEAD_DIM>(p)) : 0);
  }

 private:
  template <class E>
  E* take(void* base, int64_t count) {
    E* const result = base ? reinterpret_cast<E*>(static_cast<char*>(base) + bytes) : nullptr;
    bytes += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 256));
    return result;
  }
};

template <class T, class Config>
void run_backward(const BackwardProblem& problem, const Execution& execution) {
  const BackwardSpace<Config> space(problem, execution.workspace);
  BackwardProblem p = problem;
  p.delta = space.delta;
  const cuda::BackwardPreparation preparation{p, space.counters, space.counter_count, space.cu_seqlens_q,
                                              space.cu_seqlens_k};
  cuda::prepare_backward(preparation, execution);
  if (p.cu_seqlens_q) {
    p.cu_seqlens_q = space.cu_seqlens_q;
    p.cu_seqlens_k = space.cu_seqlens_k;
  }
  if (p.dsinks) cuda::compute_dsinks(p, execution);

  GridSchedule schedule(p.batch, p.heads_kv, p.max_seqlen_k, Config::kKeys, p.cu_seqlens_k, p.total_k);
  schedule.group_pairs(ceil_div(kConcurrentBlocks, std::max<int64_t>(1, schedule.blocks)));
  const bool direct_dbias = p.dbias.data && !broadcasts(p, p.dbias);
  const BackwardCall call{p,
                          schedule,
                          PackedBlocks(p.cu_seqlens_q, p.batch, p.total_q, Config::kRows),
                          space.query_blocks,
                          reinterpret_cast<unsigned long long*>(space.counters),
                          space.counters + 2,
                          space.dq_partial,
                          whole_vectors<T>(p.q, p.head_dim),
                          whole_vectors<T>(p.k, p.head_dim),
                          whole_vectors<T>(p.v, p.head_dim_v),
                          whole_vectors<T>(p.dout, p.head_dim_v),
                          direct_dbias,
                          precision_of(p)};
  if (p.dbias.data && !direct_dbias) bias_gradient<FAE_HEAD_DIM>(p, space.bias_gradient, execution.stream);
  const cuda::Grid grid{schedule.size(), Config::kThreads, BackwardMemory<T, Config>::kBytes};
  if (sizeof(T) == 2 && cuda::plain_scores(p))
    cuda::launch("sm80 backward", backward_kernel<T, Config, sizeof(T) == 4>, grid, execution.stream, call);
  else
    cuda::launch("sm80 backward", backward_kernel<T, Config, true>, grid, execution.stream, call);
}

}  // namespace

template <>
size_t backward_workspace<FAE_HEAD_DIM>(const BackwardProblem& p) {
  return p.dtype == DType::float32 ? BackwardSpace<BackwardConfig<float, FAE_HEAD_DIM>>(p, nullptr).bytes
                                   : BackwardSpace<BackwardConfig<__half, FAE_HEAD_DIM>>(p, nullptr).bytes;
}

template <>
void backward<FAE_HEAD_DIM>(const BackwardProblem& p, const Execution& execution) {
  switch (p.dtype) {
    case DType::bfloat16:
      return run_backward<__nv_bfloat16, BackwardConfig<__nv_bfloat16, FAE_HEAD_DIM>>(p, execution);
    case DType::float16:
      return run_backward<__half, BackwardConfig<__half, FAE_HEAD_DIM>>(p, execution);
    case DType::float32:
      return run_backward<float, BackwardConfig<float, FAE_HEAD_DIM>>(p, execution);
    case DType::float64:
      break;  // declined
  }
}

}  // namespace fae::sm80
