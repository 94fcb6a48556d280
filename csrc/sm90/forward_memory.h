#pragma once

#include "../core/schedule.h"
#include "../cuda/score_terms.h"
#include "config.h"
#include "pipeline.h"
#include "tile.h"

// What the warps of a thread block of the forward share.

namespace fae::sm90 {

// One call: the problem and what the host has worked out about it.
struct ForwardCall {
  Problem p;
  GridSchedule schedule;
  int* counter;  // of tiles taken, beyond each thread block's first; null: tiles are dealt out in turn
  cuda::ScoreConstants constants;
  TensorMap q, k, v, out;
};

// One tile on its way from the loading warp to the others, and the band of its sequence.
struct alignas(16) Work {
  int batch = 0, head = 0, row_begin = 0, q_start = 0;  // batch -1: there are no more
  cuda::DeviceBand band = {};
};

__device__ __forceinline__ KeyBlocks<int> key_blocks(const cuda::DeviceBand& band, int row, int rows, int keys) {
  const int end = min(row + rows, band.seqlen_q);
  return KeyBlocks<int>(band.any(row, end), band.every(row, end), keys);
}

template <class T, class Config>
struct ForwardMemory {
  using Q = SharedTile<T, kWarpgroupRows, Config::kDim>;
  using K = SharedTile<T, Config::kKeys, Config::kDim>;
  using V = SharedTile<T, Config::kKeys, Config::kDimV>;
  using O = SharedTile<T, kWarpgroupRows, Config::kDimV>;  // in the place of Q, once that has been used
  using RingQ = Ring<Config::kStagesQ>;
  using RingK = Ring<Config::kStagesK>;
  using RingV = Ring<Config::kStagesV>;
  static_assert(O::kBytes <= Q::kBytes);

  static constexpr int kQBytes = Config::kWarpgroups * Q::kBytes;
  static constexpr int kK = Config::kStagesQ * kQBytes, kV = kK + Config::kStagesK * K::kBytes;
  static constexpr int kWork = kV + Config::kStagesV * V::kBytes;
  static constexpr int kBarriers = kWork + Config::kStagesQ * static_cast<int>(sizeof(Work));
  static constexpr int kRingK = kBarriers + RingQ::kBytes, kRingV = kRingK + RingK::kBytes;
  static constexpr int kOutFull = kRingV + RingV::kBytes, kTail = kOutFull + 8 * Config::kStagesQ;
  static constexpr int kBytes = kTail + 8;
  static_assert(kBytes <= 227 * 1024);

  uint32_t base;

  __device__ Q q(int stage, int warpgroup) const { return {base + stage * kQBytes + warpgroup * Q::kBytes}; }
  __device__ O o(int stage, int warpgroup) const { return {base + stage * kQBytes + warpgroup * Q::kBytes}; }
  __device__ K k(int stage) const { return {base + kK + stage * K::kBytes}; }
  __device__ V v(int stage) const { return {base + kV + stage * V::kBytes}; }
  __device__ RingQ ring_q() const { return RingQ(base + kBarriers); }
  __device__ RingK ring_k() const { return RingK(base + kRingK); }
  __device__ RingV ring_v() const { return RingV(base + kRingV); }
  // O is complete in the place of Q; rows of V have arrived, of which some must be cleared.
  __device__ uint32_t out_full(int stage) const { return base + kOutFull + 8 * stage; }
  __device__ uint32_t tail_full() const { return base + kTail; }

  __device__ void init_barriers() const {
    ring_q().init(1, 1);
    ring_k().init(1, 4 * Config::kWarpgroups);
    ring_v().init(1, 4 * Config::kWarpgroups);
    for (int i = 0; i < Config::kStagesQ; ++i) init_barrier(out_full(i), 4 * Config::kWarpgroups);
    init_barrier(tail_full(), 1);
    fence_barrier_init();
  }

  __device__ void write_work(int stage, const Work& work) const { write_struct(work_address(stage), work); }
  __device__ __forceinline__ Work read_work(int stage) const { return read_struct<Work>(work_address(stage)); }

 private:
  __device__ uint32_t work_address(int stage) const { return base + kWork + stage * static_cast<int>(sizeof(Work)); }
};

}  // namespace fae::sm90
