#include "../core/schedule.h"
#include "../cuda/launch.h"
#include "../cuda/online_softmax.h"
#include "../cuda/score_terms.h"
#include "config.h"
#include "kernels.h"

// Forward attention (FlashAttention-2, arXiv 2307.08691, algorithm 1) with mma.sync. A thread block takes a block of
// query rows of one head and walks the keys that its band can see; each warp has rows of its own from Q to O. K and V
// come through two stages of shared memory, so that the copy of one block of keys overlaps the work on another.

namespace fae::sm80 {
namespace {

// One call: the problem and what the host has worked out about it.
struct ForwardCall {
  Problem p;
  GridSchedule schedule;
  int value_chunks;  // thread blocks that share the columns of O
  Precision precision;
};

template <class T, class Config>
struct ForwardMemory {
  using Q = SharedTile<T, Config::kRows, Config::kDim>;
  using K = SharedTile<T, Config::kKeys, Config::kDim>;
  using V = SharedTile<T, Config::kKeys, Config::kDimV>;
  using O = SharedTile<T, Config::kRows, Config::kDimV>;  // in the place of Q, once that has been used
  static constexpr int kStageBytes = K::kBytes + V::kBytes;
  static constexpr int kBytes = Q::kBytes + Config::kStages * kStageBytes;

  uint32_t base;

  __device__ Q q() const { return {base}; }
  __device__ O o() const { return {base}; }
  __device__ K k(int stage) const { return {base + Q::kBytes + stage * kStageBytes}; }
  __device__ V v(int stage) const { return {base + Q::kBytes + stage * kStageBytes + K::kBytes}; }
};

// kGeneral: scores are more than products times a scale.
template <class T, class Config, bool kGeneral>
class ForwardTask {
  using Memory = ForwardMemory<T, Config>;
  static constexpr int M = Config::kWarpRows / 16, N = Config::kKeys / 8, ND = Config::kDimV / 8;
  using Scores = Accumulator<M, N>;
  static constexpr int kQuerySteps = Config::kDim / kStepDepth<T>;
  static constexpr bool kQueryInRegisters = Config::kQueryInRegisters && !kGeneral;

 public:
  __device__ ForwardTask(const ForwardCall& call, const Tile& tile, const Sequence& sequence, int value_chunk)
      : call_(call),
        p_(call.p),
        batch_(static_cast<int>(tile.batch)),
        head_(static_cast<int>(tile.head)),
        row_begin_(static_cast<int>(tile.block) * Config::kRows),
        warp_row_(warp_index() * Config::kWarpRows),
        value_begin_(value_chunk * Config::kDimV),
        q_start_(static_cast<int>(sequence.q_start)),
        k_start_(static_cast<int>(sequence.k_start)),
        band_(band_of<int>(p_, sequence)),
        blocks_(band_.any(row_begin_, row_end(Config::kRows)), band_.every(row_begin_, row_end(Config::kRows)),
                Config::kKeys),
        memory_{shared_offset(dynamic_shared_memory())},
        k_next_(GlobalRows<T>::first_element(p_.k, batch_, k_start_ + blocks_.begin * Config::kKeys, head_kv(), 0)),
        v_next_(GlobalRows<T>::first_element(p_.v, batch_, k_start_ + blocks_.begin * Config::kKeys, head_kv(),
                                             value_begin_)) {}

  __device__ void run() {
    copy_rows<Config::kThreads>(memory_.q(), GlobalRows<T>(p_.q, batch_, q_start_ + row_begin_, head_,
                                                           band_.seqlen_q - row_begin_, p_.head_dim, 0));
    commit_copies();
    copy_keys(blocks_.begin);
    if constexpr (kQueryInRegisters) {
      wait_copies<1>();
      __syncthreads();
      const StraightOperand<typename Memory::Q, Side::left> q(memory_.q(), warp_row_);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int k = 0; k < kQuerySteps; ++k) query_[m][k] = q.left(m, k);
    }
    output_.fill(0);
    int block = blocks_.begin;
    if constexpr (kGeneral) {
      walk<true>(block, blocks_.end);
    } else {
      // The first two blocks look for their maxima, whether or not some of them is hidden: the second costs little, and
      // halves what a short row loses by a largest P that is not 1. The loop is for one copy of the code.
      int end = min(max(blocks_.full_begin, block + 2), blocks_.end);
#pragma unroll 1
      for (;; end = blocks_.end) {
        block = walk<true>(block, end);
        if (block == blocks_.end) break;
        block = walk<false>(block, blocks_.full_end);
      }
    }
    finish();
  }

 private:
  __device__ int row_end(int rows) const { return min(row_begin_ + rows, band_.seqlen_q); }
  __device__ static int stage_of(int block) { return Config::kStages == 1 ? 0 : block % 2; }

  __device__ int head_kv() const { return head_ / static_cast<int>(p_.heads / p_.heads_kv); }

  // Starts the copy of the next block of K and V, in a group of its own (which is empty past the last block).
  __device__ __forceinline__ void copy_keys(int block) {
    if (block < blocks_.end) {
      const int rows = band_.seqlen_k - block * Config::kKeys;
      const int64_t k_stride = p_.k.stride_row, v_stride = p_.v.stride_row;
      copy_rows<Config::kThreads>(memory_.k(stage_of(block)), GlobalRows<T>(k_next_, k_stride, rows, p_.head_dim));
      copy_rows<Config::kThreads>(memory_.v(stage_of(block)),
                                  GlobalRows<T>(v_next_, v_stride, rows, p_.head_dim_v - value_begin_));
      k_next_ += Config::kKeys * k_stride;
      v_next_ += Config::kKeys * v_stride;
    }
    commit_copies();
  }

  // Blocks of keys. kEdge: not every row has to see all of them.
  template <bool kEdge>
  __device__ __forceinline__ int walk(int block, int end) {
#pragma unroll 1
    for (; block < end; ++block) step<kEdge>(block);
    return block;
  }
  template <bool kEdge>
  __device__ __forceinline__ void step(int block) {
    wait_copies<0>();
    __syncthreads();
    if constexpr (Config::kStages > 1) copy_keys(block + 1);
    const int row = row_begin_ + warp_row_, key = block * Config::kKeys;
    if (!kEdge || warp_sees(row, key)) attend<kEdge>(row, key, stage_of(block));
    if constexpr (Config::kStages == 1) {
      __syncthreads();
      copy_keys(block + 1);
    }
  }

  // Whether any row of the warp sees any key of the block.
  __device__ bool warp_sees(int row, int key) const {
    const auto any = band_.any(row, min(row + Config::kWarpRows, band_.seqlen_q));
    return !any.empty() && any.begin < key + Config::kKeys && any.end > key;
  }

  // The warp's rows from `row` on against the keys from `key` on.
  template <bool kEdge>
  __device__ __forceinline__ void attend(int row, int key, int stage) {
    // Of float scores, which are rounded no further, the largest is to give P = 1: they are scaled before m is
    // subtracted.
    const float scale_of_scores = static_cast<float>(p_.softmax_scale) * cuda::kLog2e;
    const float scale_log2 = sizeof(T) == 4 ? 1.0f : scale_of_scores;
    const cuda::ScoreTerms<T> terms(p_, batch_, head_, band_);

    // S = Q K^T, P = exp(S - m)
    Scores s;
    const auto compute_scores = [&] {
      multiply_keys(s, stage);
      if constexpr (sizeof(T) == 4 && !kGeneral)
        s.for_each([&](int m, int half, int n, int e) { s.at(m, half, n, e) *= scale_of_scores; });
    };
    compute_scores();
    const auto follow = [&](const auto& keep) {
      const auto factors = cuda::follow_maximum<kGeneral>(states_, s, scale_log2, keep);
      if (factors.any_moved()) cuda::rescale(output_, factors);
    };
    if constexpr (kGeneral || kEdge) {
      if constexpr (kGeneral) terms.apply(s, row, key, [](int, int, int, int, float) {});
      if (!blocks_.is_full(key / Config::kKeys)) cuda::mask_band(s, band_, row, key);
      follow(cuda::RowFlags<M>());
    } else {
      const auto difference = [&](float x, float reference, auto...) { return fmaf(x, scale_log2, -reference); };
      cuda::keep_maximum(states_, s, difference, [&](const auto& keep) {
        compute_scores();
        follow(keep);
      });
    }
    if constexpr (kGeneral) {
      if (p_.dropout_p > 0)
        terms.dropout(s, row, key, [&](int m, int half, int n, int e, bool kept) {
          if (!kept) s.at(m, half, n, e) = 0;
        });
    }

    // O += P V
    multiply<Config::kKeys / kStepDepth<T>>(
        output_, [&](int m, int step) { return as_left_operand<T>(s, m, step); },
        TransposedOperand<typename Memory::V, Side::right, Config::kDimV / 16, RowOrder::pairs>(memory_.v(stage)),
        call_.precision);
  }

  __device__ __forceinline__ void multiply_keys(Scores& s, int stage) const {
    s.fill(0);
    const StraightOperand<typename Memory::K, Side::right> k(memory_.k(stage), 0);
    if constexpr (kQueryInRegisters)
      multiply<kQuerySteps>(s, [&](int m, int step) { return query_[m][step]; }, k, call_.precision);
    else
      multiply_operands<kQuerySteps>(s, StraightOperand<typename Memory::Q, Side::left>(memory_.q(), warp_row_), k,
                                     call_.precision);
  }

  // O / l and lse = m + log l, the sink counted in.
  __device__ void finish() {
    wait_copies<0>();  // of Q, where there were no keys
    __syncthreads();
    output_.for_each_row([&](int m, int half) {
      states_.x[m][half].l = cuda::quad_sum(states_.x[m][half].l);
      RowState<float> state = states_.x[m][half].total();
      const float factor = p_.sinks ? state.add_sink(static_cast<const float*>(p_.sinks)[head_]) : 1.0f;
      float weight = factor * state.inverse_sum();
      if constexpr (kGeneral) weight *= static_cast<float>(dropout_scale(p_.dropout_p));
      const int row = warp_row_ + output_.row(m, half);
#pragma unroll
      for (int n = 0; n < ND; ++n)
        store_pair(memory_.o(), row, output_.col(n, 0), output_.at(m, half, n, 0) * weight,
                   output_.at(m, half, n, 1) * weight);
      if (value_begin_ == 0 && lane_index() % 4 == 0 && row_begin_ + row < band_.seqlen_q)
        *stats_ptr<float>(p_.lse, batch_, q_start_ + row_begin_ + row, head_) = state.lse();
    });
    __syncwarp();  // a warp's rows are its own
    store_rows();
  }

  // The warp's rows of O, from shared to global memory.
  __device__ void store_rows() const {
    constexpr int kChunk = 16 / sizeof(T), kLanes = Config::kDimV / kChunk < 32 ? Config::kDimV / kChunk : 32;
    const int cols = min(static_cast<int>(p_.head_dim_v) - value_begin_, Config::kDimV);
    const int rows = min(band_.seqlen_q - row_begin_ - warp_row_, Config::kWarpRows);
    const int first = lane_index() / kLanes, lane_col = lane_index() % kLanes * kChunk;
    T* const to = row_ptr<T>(p_.out, batch_, q_start_ + row_begin_ + warp_row_ + first, head_) + value_begin_;
#pragma unroll 4
    for (int i = 0; i < Config::kWarpRows; i += cuda::kWarpThreads / kLanes)
#pragma unroll
      for (int col = lane_col; col < Config::kDimV; col += kLanes * kChunk)
        if (first + i < rows && col < cols)
          *reinterpret_cast<uint4*>(to + i * p_.out.stride_row + col) =
              load_shared_16_bytes(memory_.o().address(warp_row_ + first + i, col));
  }

  const ForwardCall& call_;
  const Problem& p_;
  const int batch_, head_, row_begin_, warp_row_, value_begin_;
  const int q_start_, k_start_;  // cu_seqlens are int32
  const cuda::DeviceBand band_;
  const KeyBlocks<int> blocks_;
  const Memory memory_;
  const T *k_next_, *v_next_;  // the thread's part of the next block to be copied
  FragmentA<T> query_[kQueryInRegisters ? M : 1][kQueryInRegisters ? kQuerySteps : 1];
  cuda::RowStates<M, kGeneral> states_;
  Accumulator<M, ND> output_;
};

template <class T, class Config, bool kGeneral>
__global__ void __launch_bounds__(Config::kThreads) forward_kernel(const __grid_constant__ ForwardCall call) {
  const unsigned index = blockIdx.x, chunks = static_cast<unsigned>(call.value_chunks);
  const Tile tile = call.schedule[index / chunks];
  const Sequence sequence = sequence_of(call.p, tile.batch);
  if (tile.block < 0 || tile.block * Config::kRows >= sequence.seqlen_q) return;
  ForwardTask<T, Config, kGeneral>(call, tile, sequence, static_cast<int>(index % chunks)).run();
}

// K and V of this many bytes fit into the second-level cache beside everything else.
constexpr int64_t kCachedBytes = int64_t{24} << 20;
// Heads whose tiles run side by side: few, so that one load of K and V from memory serves all blocks of rows that come
// for it; more where tiles differ in length, to begin with the long ones.
constexpr int64_t kEvenHeads = 4, kUnevenHeads = 16;

template <class T, class Config, bool kGeneral>
void run_forward(const Problem& p, const Execution& execution) {
  GridSchedule schedule(p.batch, p.heads, p.max_seqlen_q, Config::kRows, p.cu_seqlens_q, p.total_q);
  const int64_t keys = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k, group = p.heads / p.heads_kv;
  const int64_t head_bytes = (keys + 1) * (p.head_dim + p.head_dim_v) * static_cast<int64_t>(sizeof(T));
  schedule.group_pairs(
      std::min(std::max<int64_t>(1, kCachedBytes / head_bytes) * group, p.uneven() ? kUnevenHeads : kEvenHeads));
  schedule.last_first = true;
  const int chunks = static_cast<int>(ceil_div(p.head_dim_v, Config::kDimV));
  const ForwardCall call{p, schedule, chunks, precision_of(p)};

  const cuda::Grid grid{schedule.size() * chunks, Config::kThreads, ForwardMemory<T, Config>::kBytes};
  cuda::launch("sm80 forward", forward_kernel<T, Config, kGeneral>, grid, execution.stream, call);
}

template <class T>
void run_forward(const Problem& p, const Execution& execution) {
  // Above 256 columns, time and size of the build matter more than speed.
  if constexpr (FAE_HEAD_DIM <= 256)
    if (p.plain_scores()) return run_forward<T, ForwardConfig<T, FAE_HEAD_DIM>, false>(p, execution);
  run_forward<T, GeneralForwardConfig<T, FAE_HEAD_DIM>, true>(p, execution);
}

}  // namespace

template <>
void forward<FAE_HEAD_DIM>(const Problem& p, const Execution& execution) {
  switch (p.dtype) {
    case DType::bfloat16:
      return run_forward<__nv_bfloat16>(p, execution);
    case DType::float16:
      return run_forward<__half>(p, execution);
    case DType::float32:
      return run_forward<float>(p, execution);
    case DType::float64:
      break;  // declined
  }
}

}  // namespace fae::sm80
