#pragma once

#include "../cuda/backward_space.h"
#include "../cuda/launch.h"
#include "backward_visit.h"
#include "forward_movers.h"

// The backward of head dims beyond 128, where scores have no terms: a kernel for dQ, and one for dK and dV.
//   dQ = dS K,  dK = dS^T Q,  dV = P^T dO,  where P = exp(S - lse), dS = P (dP - delta), S = Q K^T, dP = dO V^T.
// Registers of a thread block have room for the gradient of 128 rows or keys, as for O in the forward: nobody adds to
// dQ in memory, and no warpgroup waits for another, which took more time than the products do. So dK and dV of the same
// keys are with two thread blocks of a cluster. The first computes S and dV, the second dP and dK, and needs P for
// that, which the first sends it: warp to warp, since both have the same elements in the same places. Those are seven
// products instead of five, but at the speed of the forward.
//
// Thread blocks go through tiles as those of the forward do (forward.cu), with its loading warp. The kernel for dK and
// dV looks at the problem from the keys: queries and keys, and with them all that belongs to either, change places
// (config.h, GradientTile).

namespace fae::sm90 {

constexpr int kGradientKernels = 2;
enum class Gradient { query, key, value };
// The thread blocks of a cluster, by their rank.
constexpr int kValueRank = 0, kKeyRank = 1;

struct GradientCall {
  Problem p;  // from the keys' side: with queries and keys exchanged, but for the number of heads
  GridSchedule schedule;
  int* counter;  // of tiles taken, beyond each thread block's first; null: tiles are dealt out in turn
  TensorMap q = {}, k = {}, v = {}, dout = {}, statistics = {};
  StatsView lse = {}, delta = {};  // of rows
  TensorView gradient = {};
  int cols = 0;
  float scale = 1;       // of the gradient
  int* turns = nullptr;  // [KV head or batch x KV head][tile][warp]: query heads that are done
  float* partial =
      nullptr;  // the same by tile: what they have added up, by warpgroup in the order of the threads that hold it
};

// By rank.
template <class Config>
struct GradientCalls {
  static constexpr int kCluster = Config::kFromKeys ? 2 : 1;
  GradientCall of[kCluster];
};

// A warpgroup that computes, with 64 rows of the gradient.
template <class T, class Config, Gradient kGradient>
class GradientComputer {
  using Memory = ForwardMemory<T, Config>;
  static constexpr bool kFromKeys = Config::kFromKeys;  // then products bring lse and delta along
  static_assert(kFromKeys == (kGradient != Gradient::query));
  static constexpr int N = Config::kKeys / 8, ND = Config::kDim / 8, kSteps = Config::kKeys / 16;

 public:
  __device__ GradientComputer(const GradientCall& call, const Memory& memory, int warp)
      : call_(call),
        memory_(memory),
        k_(memory.ring_k()),
        v_(memory.ring_v()),
        p_(memory.ring_p(warp)),
        warpgroup_(warp / 4),
        warp_row_(warp % 4 * 16),
        scale_log2_(static_cast<float>(call.p.softmax_scale) * cuda::kLog2e) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;; ++tile_) {
      memory_.ring_q(tile_).wait_full();
      if (work().batch < 0) return;
      gradient_.fill(0);
      const KeyBlocks<int> mine = memory_.read_blocks(tile_, warpgroup_);
      const KeyBlocks<int> all = memory_.read_blocks(tile_, Config::kWarpgroups);
      skip(all.end - (mine.empty() ? all.begin : mine.end));
      if (!mine.empty()) {
        if constexpr (kFromKeys)
          walk_keys(mine);
        else
          walk(mine);
        skip(mine.begin - all.begin);
      } else {
        release(memory_.ring_q(tile_));
        if constexpr (Config::kHasDout) {
          memory_.ring_dout(tile_).wait_full();
          release(memory_.ring_dout(tile_));
        }
      }
      finish();
    }
  }

 private:
  // What is known about the tile is read anew wherever it is needed: there are no registers that could hold it.
  __device__ __forceinline__ Work work() const { return memory_.read_work(tile_); }
  __device__ __forceinline__ int row_begin(const Work& work) const {  // of the warp
    return work.row_begin + warpgroup_ * kWarpgroupRows + warp_row_;
  }

  // Blocks that only the other warpgroup's rows see.
  __device__ __forceinline__ void skip(int blocks) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      k_.wait_full();
      release(k_);
      v_.wait_full();
      release(v_);
    }
  }

  // dQ: all blocks that the rows see, from the last to the first. S and dP are a block ahead.
  __device__ __forceinline__ void walk(const KeyBlocks<int>& blocks) {
    load_statistics();
    typename Memory::RingK ahead = k_;
    start_scores(ahead);
    memory_.ring_dout(tile_).wait_full();
    start_dprob();
    wait_products<1>();
    finish_scores(blocks, blocks.end - 1);
    finish_dprob(blocks, blocks.end - 1, ahead);
#pragma unroll 1
    for (int block = blocks.end - 2; block >= blocks.begin; --block) {
      start_gradient(memory_.k(k_.stage()));
      start_scores(ahead);
      wait_products<1>();
      finish_gradient(k_);
      start_dprob();  // not before: there are no registers for it beside dS
      wait_products<1>();
      finish_scores(blocks, block);
      finish_dprob(blocks, block, ahead);
    }
    start_gradient(memory_.k(k_.stage()));
    wait_products<0>();
    finish_gradient(k_);
  }

  // dV = P^T dO or dK = dS^T Q, likewise: what P or dS is made of, S or dP, is a block ahead.
  __device__ __forceinline__ void walk_keys(const KeyBlocks<int>& blocks) {
    start_scores(k_);
    wait_products<0>();
    finish_left(blocks, blocks.end - 1);
    pack(scores_);
#pragma unroll 1
    for (int block = blocks.end - 2; block >= blocks.begin; --block) {
      start_scores(k_);
      v_.wait_full();
      start_gradient(memory_.v(v_.stage()));
      wait_products<1>();
      finish_left(blocks, block);
      wait_products<0>();
      finish_gradient(v_);
      pack(scores_);
    }
    v_.wait_full();
    start_gradient(memory_.v(v_.stage()));
    wait_products<0>();
    finish_gradient(v_);
  }
  __device__ __forceinline__ void finish_left(const KeyBlocks<int>& blocks, int block) {
    fence_registers(scores_.x[0]);
    release(k_);
    if constexpr (kGradient == Gradient::value) {
      finish_scores(blocks, block);
      send_prob();
    } else {
      if (block == blocks.begin) release(memory_.ring_q(tile_));
      multiply_by_prob();
    }
  }

  // P to the warp of the other thread block that has the same elements of dP, as binary16, which is precise enough from
  // 6e-5 on: P is 1 at most, and where many keys share a row much less.
  __device__ __forceinline__ void send_prob() {
    p_.wait_empty();
    const uint32_t place = in_block(memory_.p(p_.stage(), warp()) + 16 * lane_index(), kKeyRank);
    const uint32_t full = in_block(p_.full(), kKeyRank);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = sm80::pack(scores_.x[0][n + i / 2][i % 2 * 2] * kSentScale,
                              scores_.x[0][n + i / 2][i % 2 * 2 + 1] * kSentScale, __half{});
      store_async(place + n / 2 * kPieceBytes, words, full);
    }
    p_.advance();
  }
  // dS = P dP.
  __device__ __forceinline__ void multiply_by_prob() {
    arrive_expecting_if(p_.full(), Memory::kPBytes, lane_index() == 0);
    p_.wait_full();
    const uint32_t place = memory_.p(p_.stage(), warp()) + 16 * lane_index();
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const uint4 piece = sm80::load_shared_16_bytes(place + n / 2 * kPieceBytes);
      const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        __half2 pair;
        memcpy(static_cast<void*>(&pair), &words[i], sizeof(pair));
        const float2 p = __half22float2(pair);
        scores_.x[0][n + i / 2][i % 2 * 2] *= p.x * (1 / kSentScale);
        scores_.x[0][n + i / 2][i % 2 * 2 + 1] *= p.y * (1 / kSentScale);
      }
    }
    fence_registers(scores_.x[0]);  // P has been used
    __syncwarp();
    arrive_in_block_if(in_block(p_.empty(), kValueRank), lane_index() == 0);
    p_.advance();
  }

  // lse (0 of a row without keys) and delta.
  __device__ __forceinline__ void load_statistics() {
    const Work tile = work();
    gradient_.for_each_row([&](int m, int half) {
      const int row = min(row_begin(tile) + gradient_.row(m, half), tile.band.seqlen_q - 1);
      const auto statistic = [&](const StatsView& view) {
        return *stats_ptr<float>(view, tile.batch, tile.q_start + row, tile.head);
      };
      lse_log2_[half] = finite_max(statistic(call_.lse)) * cuda::kLog2e;
      delta_[half] = statistic(call_.delta);
    });
  }

  // S = Q K^T. From the keys' side less lse / scale; or dP = V dO^T - delta, where dO is called K.
  __device__ __forceinline__ void start_scores(const typename Memory::RingK& k) {
    k.wait_full();
    const Memory memory = memory_.unknown();
    begin_products();
    start_folded<kFromKeys>(scores_, kGradient == Gradient::key ? memory.delta_selector() : memory.lse_selector(),
                            memory.q(0, warpgroup_), memory_.k(k.stage()), memory_.statistics(k.stage()));
  }
  // dP = dO V^T.
  __device__ __forceinline__ void start_dprob() {
    v_.wait_full();
    const Memory memory = memory_.unknown();
    begin_products();
    start_straight(dprob_, memory.dout(0, warpgroup_), memory_.v(v_.stage()));
  }

  // P. No probability exceeds 1, but for the rounding of huge scores. After the last block, the next tile's Q can come.
  __device__ __forceinline__ void finish_scores(const KeyBlocks<int>& blocks, int block) {
    if (block == blocks.begin) release(memory_.ring_q(tile_));
    fence_registers(scores_.x[0]);
    if (!blocks.is_full(block)) {
      const Work tile = work();
      cuda::mask_band(scores_, tile.band, row_begin(tile), block * Config::kKeys);
    }
    scores_.for_each([&](int m, int half, int n, int e) {
      float& x = scores_.at(m, half, n, e);
      x = cuda::exp2_approx(fminf(kFromKeys ? x * scale_log2_ : fmaf(x, scale_log2_, -lse_log2_[half]), 0.0f));
    });
    fence_registers(scores_.x[0]);
  }
  // dS, as left operand. After the last block, the next tile's dO can come.
  __device__ __forceinline__ void finish_dprob(const KeyBlocks<int>& blocks, int block, typename Memory::RingK& ahead) {
    wait_products<0>();
    if (block == blocks.begin) release(memory_.ring_dout(tile_));
    ahead.advance();
    fence_registers(dprob_.x[0]);
    release(v_);
    dprob_.for_each([&](int m, int half, int n, int e) {
      float& x = dprob_.at(m, half, n, e);
      x = scores_.at(m, half, n, e) * (x - delta_[half]);
    });
    pack(dprob_);
  }
  __device__ __forceinline__ void pack(const Accumulator<1, N>& x) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const sm80::FragmentA<T> fragment = sm80::as_left_operand<T>(x, 0, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) left_[k][i] = fragment.x[i];
    }
  }

  template <class Tile>
  __device__ __forceinline__ void start_gradient(const Tile& right) {
    fence_registers(gradient_.x[0]);
    fence_registers(left_);
    begin_products();
    start_transposed(gradient_, left_, right);
  }
  template <class Ring>
  __device__ __forceinline__ void finish_gradient(Ring& ring) {
    fence_registers(gradient_.x[0]);
    release(ring);
  }

  __device__ __forceinline__ void finish() {
    const Work tile = work();
    const auto write = [&] {
      const int row = row_begin(tile);
      sm80::write_rows<T, true>(gradient_, call_.gradient, tile.batch, tile.q_start + row, tile.head,
                                tile.band.seqlen_q - row, 0, call_.cols, call_.scale);
    };
    if constexpr (!kFromKeys) return write();
    // Query heads that share the keys add to each other.
    const GridSchedule& tiles = call_.schedule;
    const int heads = static_cast<int>(call_.p.heads_kv), group = static_cast<int>(call_.p.heads) / heads;
    const int rank = tile.head_kv % group, blocks = static_cast<int>(tiles.blocks);
    const int first = tiles.packed.cu_seqlens ? tiles.packed.first(tile.batch) + tile.head * blocks
                                              : (tile.batch * heads + tile.head) * blocks;
    const int slot = first + tile.row_begin / Config::kRows;
    float* const partial = call_.partial + int64_t{slot} * Config::kRows * Config::kDim;
    take_turn(
        call_.turns + slot * 4 * Config::kWarpgroups + warp(), rank, rank + 1 == group,
        [&] { leave(partial, warpgroup_ * ND, gradient_, rank); },
        [&] {
          collect(partial, warpgroup_ * ND, gradient_, rank);
          write();
        });
  }

  template <class Ring>
  __device__ __forceinline__ static void release(Ring&& ring) {
    arrive_if(ring.empty(), lane_index() == 0);
    ring.advance();
  }

  __device__ __forceinline__ int warp() const { return warpgroup_ * 4 + warp_row_ / 16; }

  static constexpr int kPieceBytes = 16 * cuda::kWarpThreads;  // of P, by lane
  static constexpr float kSentScale = 32768;
  const GradientCall& call_;
  const Memory memory_;
  typename Memory::RingK k_;
  typename Memory::RingV v_;
  typename Memory::RingP p_;
  const int warpgroup_, warp_row_;  // the warp's rows begin at warp_row_ of the warpgroup's
  const float scale_log2_;
  unsigned tile_ = 0;
  float lse_log2_[2], delta_[2];
  Accumulator<1, N> scores_, dprob_;
  uint32_t left_[kSteps][4];
  Accumulator<1, ND> gradient_;
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    gradient_kernel(const __grid_constant__ GradientCalls<Config> calls) {
  const ForwardMemory<T, Config> memory{sm80::shared_offset(sm80::dynamic_shared_memory())};
  const int rank = Config::kFromKeys ? cluster_rank() : 0;
  const GradientCall& call = calls.of[rank];
  if (Config::kHasStatistics && threadIdx.x < 64) init_selectors(memory.lse_selector(), static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&call.q, &call.k, &call.v}) prefetch(*map);
    if (Config::kHasDout) prefetch(call.dout);
    if (Config::kHasStatistics) prefetch(call.statistics);
    memory.init_barriers();
  }
  Config::kFromKeys ? sync_cluster() : __syncthreads();
  // The kernels need nothing of each other: one begins where the one before has nothing left to do, and ends after it,
  // so that what follows the last one follows all of them.
  if (!Config::kFromKeys) wait_for_previous();
  let_next_begin();
  const int warp = uniform(warp_index());
  if (warp < 4) {
    give_registers_back<Config::kMoverRegisters>();
    if (warp == 0) Loader<T, Config, GradientCall>(call, memory).run();
    if (warp == 1 && Config::kFromKeys) wait_for_previous();
  } else {
    take_registers<Config::kComputeRegisters>();
    if constexpr (!Config::kFromKeys)
      GradientComputer<T, Config, Gradient::query>(call, memory, warp - 4).run();
    else if (rank == kValueRank)
      GradientComputer<T, Config, Gradient::value>(call, memory, warp - 4).run();
    else
      GradientComputer<T, Config, Gradient::key>(call, memory, warp - 4).run();
  }
  if (Config::kFromKeys) sync_cluster();  // neither is gone while the other one may still send it something
}

// ---- Host -----------------------------------------------------------------------------------------------------------

inline Problem seen_from_keys(const BackwardProblem& p) {
  Problem seen = p;
  std::swap(seen.max_seqlen_q, seen.max_seqlen_k);
  std::swap(seen.total_q, seen.total_k);
  std::swap(seen.cu_seqlens_q, seen.cu_seqlens_k);
  std::swap(seen.seqused_q, seen.seqused_k);
  std::swap(seen.window_left, seen.window_right);
  return seen;
}

// All but the roles of tensors and what becomes of the gradient.
template <class T, class Config>
GradientCall gradient_call(const Problem& p, int* counter) {
  GridSchedule schedule(p.batch, p.heads, p.max_seqlen_q, Config::kRows, p.cu_seqlens_q, p.total_q);
  schedule.group_pairs(concurrent_heads(p), Config::kFromKeys ? p.heads / p.heads_kv : 1);
  schedule.last_first = !Config::kFromKeys;  // the longest tiles of a causal mask
  return {p, schedule, Config::kFromKeys || p.uneven() ? counter : nullptr};
}

template <class T, class Config>
void launch_gradients(const char* name, const GradientCalls<Config>& calls, const Execution& execution) {
  constexpr int kCluster = GradientCalls<Config>::kCluster;
  const int at_once = std::max(1, cuda::multiprocessors() / kCluster);  // too few: the launch fails and says so
  const int64_t clusters = std::min<int64_t>(calls.of[0].schedule.size(), at_once);
  const cuda::Grid grid{.blocks = clusters * kCluster,
                        .threads = Config::kThreads,
                        .shared_bytes = ForwardMemory<T, Config>::kBytes,
                        .overlaps = true,
                        .cluster = kCluster};
  cuda::launch(name, gradient_kernel<T, Config>, grid, execution.stream, calls);
}

// The problem and its workspace as prepare_backward has left them.
template <class T, int kHeadDim, class Space>
void run_separate_kernels(const BackwardProblem& p, const Space& space, const Execution& execution) {
  using QueryConfig = GradientConfig<kHeadDim, false>;
  using KeyConfig = GradientConfig<kHeadDim, true>;
  static_assert(KeyConfig::kRows == QueryConfig::kRows && KeyConfig::kKeys == QueryConfig::kKeys);
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  const auto of_queries = [&](const TensorView& view, int64_t cols, int rows) {
    return make_tensor_map(p.dtype, view, {cols, p.cu_seqlens_q ? p.total_q : p.max_seqlen_q, p.heads, batch}, rows);
  };
  const auto of_keys = [&](const TensorView& view, int64_t cols, int rows) {
    return make_tensor_map(p.dtype, view, {cols, p.cu_seqlens_k ? p.total_k : p.max_seqlen_k, p.heads_kv, batch}, rows);
  };
  const float scale = static_cast<float>(p.softmax_scale);
  constexpr int kBlock = QueryConfig::kKeys;
  int* const counters = space.others();

  GradientCall dq = gradient_call<T, QueryConfig>(p, counters);
  dq.q = of_queries(p.q, p.head_dim, kWarpgroupRows), dq.dout = of_queries(p.dout, p.head_dim_v, kWarpgroupRows);
  dq.k = of_keys(p.k, p.head_dim, kBlock), dq.v = of_keys(p.v, p.head_dim_v, kBlock);
  dq.lse = p.lse, dq.delta = p.delta;
  dq.gradient = p.dq, dq.cols = static_cast<int>(p.head_dim), dq.scale = scale;
  launch_gradients<T, QueryConfig>("sm90 dQ", {{dq}}, execution);

  GradientCall dv = gradient_call<T, KeyConfig>(seen_from_keys(p), counters + 1);
  dv.statistics = space.statistics_map(p, kBlock);
  dv.turns = counters + kGradientKernels, dv.partial = space.dkv_partial;
  GradientCall dk = dv;
  dv.q = of_keys(p.k, p.head_dim, kWarpgroupRows);
  dv.k = of_queries(p.q, p.head_dim, kBlock), dv.v = of_queries(p.dout, p.head_dim_v, kBlock);
  dv.gradient = p.dv, dv.cols = static_cast<int>(p.head_dim_v);

  dk.q = of_keys(p.v, p.head_dim_v, kWarpgroupRows), dk.k = dv.v, dk.v = dv.k;
  dk.gradient = p.dk, dk.cols = static_cast<int>(p.head_dim), dk.scale = scale;
  const int64_t slots = space.shared_key_blocks(p);
  dk.turns += slots * 4 * KeyConfig::kWarpgroups;
  dk.partial += slots * KeyConfig::kRows * KeyConfig::kDim;
  static_assert(kValueRank == 0 && kKeyRank == 1);
  launch_gradients<T, KeyConfig>("sm90 dK, dV", {{dv, dk}}, execution);
}

}  // namespace fae::sm90
