#include "../cuda/backward_space.h"
#include "../cuda/delta.h"
#include "../cuda/launch.h"
#include "kernels.h"
#include "recompute.h"

// Backward attention by recomputation (FlashAttention-2, arXiv 2307.08691, algorithm 2) with mma.sync:
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = dS K,  dK = dS^T Q.
// A thread block keeps a block of keys of one KV head, and dK and dV of it in registers, while it walks the query
// blocks of the heads that share those keys. Scores are computed transposed: where a warp has all rows of its keys, P^T
// and dS^T are left operands as they are, else they pass from warp to warp through shared memory.
//
// In the interval between two barriers a warp finishes one query block (at least dQ) and computes P and dS of the next:
// warps may be a whole interval apart, so that one computes exponentials while others multiply.
//
// dQ of a query block is a sum over the key blocks that see it ("visitors"). It grows in global memory, and visitors
// take turns, so that it has the same bits every time: the first one stores, others add, and the last one writes the
// result. Nothing has to be set to zero, and nothing to be converted afterwards. A thread block only ever waits for
// blocks that have drawn a lower ticket, which are running or done: there is no deadlock.

namespace fae::sm80 {
namespace {

// One call: the problem and what the host has worked out about it.
struct BackwardCall {
  BackwardProblem p;
  cuda::Tasks tasks;          // (batch, KV head, block of keys)
  PackedBlocks query_blocks;  // packed tensors
  int query_blocks_per_head;
  unsigned long long* ticket;
  int* turns;         // [head or batch x head][query block]: visitors that are done
  float* dq_partial;  // the same, by a block's sums in the order of the threads that hold them
  bool direct_dbias;
  Precision precision;
};

template <class T, class Config>
struct BackwardMemory {
  using K = typename ScoreOperands<T, Config>::Keys;
  using Q = typename ScoreOperands<T, Config>::Rows;
  using P = SharedTile<T, Config::kKeys, Config::kRows>;  // P^T and dS^T
  static constexpr int kStageBytes = 2 * Q::kBytes;
  static constexpr int kBufferBytes = (Config::kInRegisters ? 1 : 2) * P::kBytes;
  static constexpr int kBuffers = 2 * K::kBytes + Config::kStages * kStageBytes;
  static constexpr int kStatistics = kBuffers + Config::kBuffers * kBufferBytes;
  static constexpr int kBytes = kStatistics + Config::kStages * Config::kRows * 8;

  uint32_t base;

  __device__ K k() const { return {base}; }
  __device__ K v() const { return {base + K::kBytes}; }
  __device__ Q q(int stage) const { return {base + 2 * K::kBytes + stage * kStageBytes}; }
  __device__ Q dout(int stage) const { return {base + 2 * K::kBytes + stage * kStageBytes + Q::kBytes}; }
  __device__ P ds(int buffer) const { return {base + kBuffers + buffer * kBufferBytes}; }
  __device__ P p(int buffer) const { return {base + kBuffers + buffer * kBufferBytes + P::kBytes}; }
  __device__ uint32_t statistics(int stage) const { return base + kStatistics + stage * Config::kRows * 8; }
  __device__ ScoreOperands<T, Config> operands(int stage) const {
    return {q(stage), dout(stage), k(), v(), statistics(stage)};
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

// kGeneral: scores are more than products times a scale.
template <class T, class Config, bool kGeneral>
class BackwardTask {
  using Memory = BackwardMemory<T, Config>;
  using KeyPlace = KeyWarps<Config>;
  using QueryPlace = QueryWarps<Config>;
  using KeyGradient = Accumulator<KeyPlace::M, KeyPlace::N>;
  using QueryGradient = Accumulator<QueryPlace::M, QueryPlace::N>;

 public:
  __device__ BackwardTask(const BackwardCall& call, const Tile& tile, bool last_first, const Sequence& sequence)
      : call_(call),
        p_(call.p),
        batch_(static_cast<int>(tile.batch)),
        head_kv_(static_cast<int>(tile.head)),
        block_(static_cast<int>(tile.block)),
        last_first_(last_first),
        first_slot_(static_cast<uint32_t>(call.query_blocks.cu_seqlens
                                              ? call.query_blocks.first(batch_)
                                              : batch_ * p_.heads * call.query_blocks_per_head)),
        q_start_(static_cast<int>(sequence.q_start)),
        k_start_(static_cast<int>(sequence.k_start)),
        band_(band_of<int>(p_, sequence)),
        memory_{shared_offset(dynamic_shared_memory())} {
    const auto rows = band_.rows_any(key_begin(), min(key_begin() + Config::kKeys, band_.seqlen_k));
    if (rows.empty()) return;
    first_rows_ = rows.begin / Config::kRows;
    row_blocks_ = ceil_div(rows.end, Config::kRows) - first_rows_;
  }

  __device__ void run() {
    copy_keys(memory_.k(), p_.k, p_.head_dim);
    copy_keys(memory_.v(), p_.v, p_.head_dim_v);
    dk_.fill(0);
    dv_.fill(0);
    const int group = static_cast<int>(p_.heads / p_.heads_kv), end = row_blocks_ > 0 ? (head_kv_ + 1) * group : 0;
    Step step{head_kv_ * group, first_of_head(), 0};
    copy_queries(step, end);
    Step before = step;  // the last step that was computed
    if constexpr (Config::kLag) {
#pragma unroll 1
      for (bool more = true; more; before = step, step = after(step)) {
        more = step.head < end;
        wait_copies<0>();
        __syncthreads();
        copy_queries(after(step), end);
        before.number = step.number - 1;
        if (step.number > 1) pass_turn(previous(before));
        if (!Config::kInRegisters && step.number > 0) finish(before);
        if (more) recompute(step);
        if (Config::kInRegisters && step.number > 0) finish(before);
      }
      before = previous(before);
    } else {
#pragma unroll 1
      for (; step.head < end; before = step, step = after(step)) {
        wait_copies<0>();
        __syncthreads();
        if (Config::kStages > 1) copy_queries(after(step), end);
        if (step.number > 0) pass_turn(before);
        recompute(step);
        __syncthreads();
        finish(step);
        if (Config::kStages > 1) continue;
        __syncthreads();
        copy_queries(after(step), end);
      }
    }
    wait_copies<0>();  // nothing may arrive after this block
    __syncthreads();
    if (end > 0) pass_turn(before);
    write(dk_, p_.dk, static_cast<int>(p_.head_dim), static_cast<float>(p_.softmax_scale));
    write(dv_, p_.dv, static_cast<int>(p_.head_dim_v), 1.0f);
  }

 private:
  __device__ int key_begin() const { return block_ * Config::kKeys; }

  // A query block of a head, and its number, which tells where in shared memory it lies. Key blocks that were handed
  // out from the first one on walk the queries from the end, others from the start: each follows its predecessor at a
  // distance.
  struct Step {
    int head, block, number;
    __device__ int stage() const { return number % Config::kStages; }
    __device__ int buffer() const { return number % Config::kBuffers; }
  };
  __device__ int first_of_head() const { return last_first_ ? first_rows_ : first_rows_ + row_blocks_ - 1; }
  __device__ Step after(const Step& step) const {
    const int block = step.block + (last_first_ ? 1 : -1);
    const bool same_head = static_cast<unsigned>(block - first_rows_) < static_cast<unsigned>(row_blocks_);
    return {same_head ? step.head : step.head + 1, same_head ? block : first_of_head(), step.number + 1};
  }

  __device__ Step previous(const Step& step) const {
    const int block = step.block - (last_first_ ? 1 : -1);
    const bool same_head = static_cast<unsigned>(block - first_rows_) < static_cast<unsigned>(row_blocks_);
    return {same_head ? step.head : step.head - 1,
            same_head ? block : 2 * first_rows_ + row_blocks_ - 1 - first_of_head(), step.number - 1};
  }

  __device__ __forceinline__ void copy_keys(const typename Memory::K& to, const TensorView& view, int64_t dim) const {
    copy_rows<Config::kThreads>(
        to, GlobalRows<T>(view, batch_, k_start_ + key_begin(), head_kv_, band_.seqlen_k - key_begin(), dim, 0));
  }

  // Starts the copy of Q, dO and the statistics, in a group of its own (which is empty past the last step).
  __device__ __forceinline__ void copy_queries(const Step& step, int end) const {
    if (step.head < end) {
      const int begin = step.block * Config::kRows, rows = band_.seqlen_q - begin, stage = step.stage();
      const int64_t row = q_start_ + begin;
      const auto copy = [&](const typename Memory::Q& to, const TensorView& view, int64_t dim) {
        copy_rows<Config::kThreads>(to, GlobalRows<T>(view, batch_, row, step.head, rows, dim, 0));
      };
      copy(memory_.q(stage), p_.q, p_.head_dim);
      copy(memory_.dout(stage), p_.dout, p_.head_dim_v);
      copy_statistics<Config>(memory_.statistics(stage), p_, batch_, row, step.head, rows);
    }
    commit_copies();
  }

  // P and dS of the warp's rows and keys. Where they stay in registers, dV += P^T dO and dK += dS^T Q.
  __device__ __forceinline__ void recompute(const Step& step) {
    if (!ScoreWarps<Config>::exists()) return;
    using Recompute = sm80::Recompute<T, Config, kGeneral>;
    const ScoreWarps<Config> place;
    const int stage = step.stage(), buffer = step.buffer(), row = step.block * Config::kRows;
#pragma unroll 1
    for (int sub_row = 0; sub_row < Config::kRows; sub_row += Config::kSubRows) {
      typename Recompute::Scores prob, ds;
      Recompute(p_, batch_, step.head, band_, call_.precision)(
          memory_.operands(stage), row, key_begin(), sub_row, prob, ds, [&](int m, int half, int n, int e, float x) {
            if (call_.direct_dbias)
              cuda::write_bias_gradient<T>(p_.dbias, band_, batch_, step.head,
                                           row + sub_row + place.col + prob.row(m, half),
                                           key_begin() + place.row + prob.col(n, e), x);
          });
      store(memory_.ds(buffer), ds, sub_row);
      if constexpr (Config::kInRegisters) {
        multiply_scores(dv_, prob, memory_.dout(stage), sub_row);
        multiply_scores(dk_, ds, memory_.q(stage), sub_row);
      } else {
        store(memory_.p(buffer), prob, sub_row);
      }
    }
  }

  template <class Scores>
  __device__ __forceinline__ void store(const typename Memory::P& tile, const Scores& x, int sub_row) const {
    const ScoreWarps<Config> place;
    const PairStore<typename Memory::P, Scores::kRowPieces> pairs(tile, place.row, sub_row + place.col);
#pragma unroll
    for (int n = 0; n < Scores::kColPieces; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int m = 0; m < Scores::kRowPieces; ++m) pairs.store(2 * n + e, m, x.at(m, 0, n, e), x.at(m, 1, n, e));
  }

  // gradient += X^T Y, X^T in registers, Y the rows of a tile from sub_row on.
  template <class Scores>
  __device__ __forceinline__ void multiply_scores(KeyGradient& gradient, const Scores& x,
                                                  const typename Memory::Q& tile, int sub_row) const {
    const typename Memory::Q rows{tile.base + sub_row * cuda::kSwizzleBytes};
    multiply<Config::kSubRows / kStepDepth<T>>(
        gradient, [&](int m, int k) { return as_left_operand<T>(x.transpose, m, k); },
        TransposedOperand<typename Memory::Q, Side::right, KeyPlace::N / 2, RowOrder::pairs>(rows), call_.precision);
  }

  // What is left of a step when all warps' P and dS are there.
  __device__ __forceinline__ void finish(const Step& step) {
    const int stage = step.stage(), buffer = step.buffer();
    if (QueryPlace::exists()) {
      const Turn turn = turn_of(step);
      const int before = turn.rank > 0 ? load_relaxed(done(turn)) : 0;  // comes while the product is computed
      QueryGradient dq;
      dq.fill(0);
      const TransposedOperand<typename Memory::P, Side::left, QueryPlace::M> ds(memory_.ds(buffer), QueryPlace().row);
      multiply_operands<Config::kKeys / kStepDepth<T>>(
          dq, ds, TransposedOperand<typename Memory::K, Side::right, QueryPlace::N / 2>(memory_.k(), QueryPlace().col),
          call_.precision);  // dS K
      add_to_dq(dq, step, turn, before);
    }
    if (!Config::kInRegisters && KeyPlace::exists()) {
      multiply_tiles(dv_, memory_.p(buffer), memory_.dout(stage));  // P^T dO
      multiply_tiles(dk_, memory_.ds(buffer), memory_.q(stage));    // dS^T Q
    }
  }

  __device__ __forceinline__ void multiply_tiles(KeyGradient& gradient, const typename Memory::P& x,
                                                 const typename Memory::Q& y) const {
    const StraightOperand<typename Memory::P, Side::left> left(x, KeyPlace().row);
    multiply_operands<Config::kRows / kStepDepth<T>>(
        gradient, left, TransposedOperand<typename Memory::Q, Side::right, KeyPlace::N / 2>(y, KeyPlace().col),
        call_.precision);
  }

  // ---- dQ, in turns -------------------------------------------------------------------------------------------------

  // This block's turn to add to a query block's dQ.
  struct Turn {
    int rank, visitors;
    uint32_t slot;  // of the query block
    __device__ bool last() const { return rank == visitors - 1; }
  };
  __device__ __forceinline__ Turn turn_of(const Step& step) const {
    const int begin = step.block * Config::kRows;
    const auto keys = band_.any(begin, min(begin + Config::kRows, band_.seqlen_q));
    const int first = keys.begin / Config::kKeys, visitors = ceil_div(keys.end, Config::kKeys) - first;
    const int rank = last_first_ ? first + visitors - 1 - block_ : block_ - first;
    return {rank, visitors, first_slot_ + static_cast<uint32_t>(step.head * call_.query_blocks_per_head + step.block)};
  }
  __device__ int* done(const Turn& turn) const { return call_.turns + turn.slot; }

  __device__ __forceinline__ void add_to_dq(QueryGradient& dq, const Step& step, const Turn& turn, int before) {
    while (before < turn.rank) before = load_relaxed(done(turn));
    float4* const partial =
        reinterpret_cast<float4*>(call_.dq_partial + int64_t{turn.slot} * kPartialFloats<Config>) + threadIdx.x;
    if (!turn.last()) {
      // An addition is not performed before the branch that leads to it.
      if (turn.rank > 0)
        for_each_sum(dq, partial, [](float4* sum, float (&x)[4]) { add_to_global(reinterpret_cast<float*>(sum), x); });
      else
        for_each_sum(dq, partial, [](float4* sum, float (&x)[4]) { *sum = {x[0], x[1], x[2], x[3]}; });
      return;
    }
    if (turn.rank > 0) {
      load_acquire(done(turn));  // a load might be
      for_each_sum(dq, partial, [](float4* sum, float (&x)[4]) {
        const float4 others = __ldcg(sum);
        x[0] += others.x, x[1] += others.y, x[2] += others.z, x[3] += others.w;
      });
    }
    const QueryPlace place;
    const int row = step.block * Config::kRows + place.row;
    write_rows<T>(dq, p_.dq, batch_, q_start_ + row, step.head, band_.seqlen_q - row, place.col,
                  static_cast<int>(p_.head_dim), static_cast<float>(p_.softmax_scale));
  }

  template <class F>
  static __device__ __forceinline__ void for_each_sum(QueryGradient& dq, float4* partial, F&& f) {
#pragma unroll
    for (int m = 0; m < QueryPlace::M; ++m)
#pragma unroll
      for (int n = 0; n < QueryPlace::N; ++n) f(partial + (m * QueryPlace::N + n) * Config::kThreads, dq.x[m][n]);
  }

  // Lets the next visitor of a query block begin. All warps have been at a barrier since they added their shares. The
  // release takes as long as an eighth of a step: one warp after the other does it, while the others compute.
  __device__ __forceinline__ void pass_turn(const Step& step) const {
    if (warp_index() != step.number % Config::kWarps || lane_index() != 0) return;
    const Turn turn = turn_of(step);
    if (!turn.last()) store_release(done(turn), turn.rank + 1);
  }

  // ---- Results ------------------------------------------------------------------------------------------------------

  __device__ void write(const KeyGradient& x, const TensorView& view, int head_dim, float scale) const {
    if (!KeyPlace::exists()) return;
    const KeyPlace place;
    const int row = key_begin() + place.row;
    write_rows<T>(x, view, batch_, k_start_ + row, head_kv_, band_.seqlen_k - row, place.col, head_dim, scale);
  }

  const BackwardCall& call_;
  const BackwardProblem& p_;
  const int batch_, head_kv_, block_;
  const bool last_first_;        // key blocks were handed out from the last one on
  const uint32_t first_slot_;    // of the sequence's query blocks
  const int q_start_, k_start_;  // cu_seqlens are int32
  const cuda::DeviceBand band_;
  Memory memory_;
  int first_rows_ = 0, row_blocks_ = 0;  // query blocks that see any of the keys
  KeyGradient dk_, dv_;
};

template <class T, class Config, bool kGeneral>
__global__ void __launch_bounds__(Config::kThreads) backward_kernel(const __grid_constant__ BackwardCall call) {
  // In a place that nobody writes to before the first barrier of the walk.
  auto* const ticket =
      reinterpret_cast<unsigned long long*>(dynamic_shared_memory() + BackwardMemory<T, Config>::kBuffers);
  if (threadIdx.x == 0) *ticket = atomicAdd(call.ticket, 1ull);
  __syncthreads();
  const auto number = static_cast<uint32_t>(*ticket);
  if (number >= call.tasks.size()) return;
  const Tile tile = call.tasks[number];
  const Sequence sequence = sequence_of(call.p, tile.batch);
  if (tile.block < 0 || tile.block * Config::kKeys >= sequence.seqlen_k) return;
  if constexpr (BackwardMemory<T, Config>::kBytes <= cuda::kMostSharedMemory)  // else it is not for this device
    BackwardTask<T, Config, kGeneral>(call, tile, call.tasks.is_last_first(tile.head), sequence).run();
}

// ---- Host -----------------------------------------------------------------------------------------------------------

// Warps that run at the same time on a large GPU.
constexpr int64_t kConcurrentWarps = 1024;

// The parts of the workspace.
template <class Config>
struct BackwardSpace : cuda::BackwardSpace {
  void* bias_gradient;

  BackwardSpace(const BackwardProblem& p, void* base)
      : cuda::BackwardSpace(p, base, Config::kRows, Config::kKeys, kPartialFloats<Config>) {
    const bool pass = p.dbias.data && broadcasts(p, p.dbias);
    bias_gradient = take<char>(pass ? static_cast<int64_t>(bias_gradient_workspace<FAE_HEAD_DIM>(p)) : 0);
  }
};

template <class T, class Config, bool kGeneral>
void run_backward(const BackwardProblem& problem, const Execution& execution) {
  const BackwardSpace<Config> space(problem, execution.workspace);
  const cuda::TaskOrder order = cuda::task_order<T, Config>(problem.heads_kv, 1, kConcurrentWarps / Config::kWarps);
  const BackwardProblem p = cuda::prepare_backward(problem, space, {}, order, execution);
  if (p.dsinks) cuda::compute_dsinks(p, execution);

  const cuda::Tasks tasks(p, order, space);
  const bool direct_dbias = p.dbias.data && !broadcasts(p, p.dbias);
  const BackwardCall call{p,
                          tasks,
                          PackedBlocks(p.cu_seqlens_q, p.batch, p.total_q, Config::kRows),
                          static_cast<int>(space.query_blocks),
                          space.ticket(),
                          space.turns(),
                          space.dq_partial,
                          direct_dbias,
                          precision_of(p)};
  if (p.dbias.data && !direct_dbias) bias_gradient<FAE_HEAD_DIM>(p, space.bias_gradient, execution.stream);
  const cuda::Grid grid{tasks.most(), Config::kThreads, BackwardMemory<T, Config>::kBytes};
  cuda::launch("sm80 backward", backward_kernel<T, Config, kGeneral>, grid, execution.stream, call);
}

// f(config, general) with the config for this call on this device, and std::bool_constant general.
template <class T, class F>
auto with_config(const BackwardProblem& p, F&& f) {
  const auto choose = [&](auto large, auto small, auto general) {
    constexpr size_t kLarge = BackwardMemory<T, decltype(large)>::kBytes;
    if constexpr (kLarge > BackwardMemory<T, decltype(small)>::kBytes)
      if (cuda::shared_memory_per_block() >= kLarge) return f(large, general);
    return f(small, general);
  };
  if constexpr (sizeof(T) == 2 || FAE_HEAD_DIM <= 256)
    if (p.plain_scores())
      return choose(LargeBackwardConfig<T, FAE_HEAD_DIM>{}, BackwardConfig<T, FAE_HEAD_DIM>{}, std::false_type{});
  return choose(LargeGeneralBackwardConfig<T, FAE_HEAD_DIM>{}, GeneralBackwardConfig<T, FAE_HEAD_DIM>{},
                std::true_type{});
}

template <class T>
size_t workspace_of(const BackwardProblem& p) {
  return with_config<T>(p, [&](auto config, auto) { return BackwardSpace<decltype(config)>(p, nullptr).bytes; });
}
template <class T>
void run(const BackwardProblem& p, const Execution& execution) {
  with_config<T>(p, [&](auto config, auto general) { run_backward<T, decltype(config), general()>(p, execution); });
}

}  // namespace

template <>
size_t backward_workspace<FAE_HEAD_DIM>(const BackwardProblem& p) {
  return p.dtype == DType::float32 ? workspace_of<float>(p) : workspace_of<__half>(p);
}

template <>
void backward<FAE_HEAD_DIM>(const BackwardProblem& p, const Execution& execution) {
  switch (p.dtype) {
    case DType::bfloat16:
      return run<__nv_bfloat16>(p, execution);
    case DType::float16:
      return run<__half>(p, execution);
    case DType::float32:
      return run<float>(p, execution);
    case DType::float64:
      break;  // declined
  }
}

}  // namespace fae::sm80
