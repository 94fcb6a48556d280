#pragma once

#include "../core/schedule.h"
#include "../cuda/score_terms.h"
#include "config.h"
#include "overlay.h"
#include "pipeline.h"
#include "tile.h"

// What the warps of a thread block of the forward share.

namespace fae::sm90 {

// One call: the problem and what the host has worked out about it.
struct ForwardCall {
  Problem p;
  GridSchedule schedule;
  bool heads_first;  // the schedule has heads in the place of batches, and the other way round
  int* counter;      // of tiles taken, beyond each thread block's first; null: tiles are dealt out in turn
  cuda::ScoreConstants constants;
  TensorMap q, k, v, out, overlay;
};

// Heads whose tiles run side by side where some tiles are longer than others: enough to begin with the long ones. Tiles
// of a head then walk through its K and V not far from each other, so that the second-level cache need not hold all of
// it. Even tiles run head by head: then one load from memory serves all.
FAE_INLINE int64_t concurrent_heads(const Problem& p) { return p.uneven() ? 16 : 1; }
// Where batches share an overlay, but heads do not, those of a head run side by side, so that one load from memory
// serves all.
FAE_INLINE bool heads_go_first(const Problem& p, const ScoreView& overlay) {
  return p.batch > 1 && !p.cu_seqlens_q && overlay.size_batch == 1 && overlay.size_head > 1;
}

// One tile on its way from the loading warp to the others, and the band of its sequence.
struct alignas(16) Work {
  int batch = 0, head = 0, head_kv = 0, row_begin = 0, q_start = 0, k_start = 0;  // batch -1: there are no more
  cuda::DeviceBand band = {};
  // Of several heads, each has so many blocks of keys, from this one on. They are numbered one head after the other.
  int head_blocks = 0, first_block = 0;

  // The number of block 0 of the tile's head number i.
  __device__ int numbered_from(int i) const { return i * head_blocks - first_block; }
};

template <class T, class Config>
struct ForwardMemory {
  using Q = SharedTile<T, kWarpgroupRows, Config::kDim>;
  using K = SharedTile<T, Config::kKeys, Config::kDim>;
  using V = SharedTile<T, Config::kKeys, Config::kDimV>;
  using O = SharedTile<T, kWarpgroupRows, Config::kDimV>;  // in the place of Q, once that has been used
  using RingQ = Ring<Config::kStagesQ>;
  using RingK = Ring<Config::kStagesK>;
  using RingV = Ring<Config::kStagesV>;
  // What lies over a warpgroup's rows of a block of scores.
  using Overlay = OverlayTile<T, Config::kOverlay, kWarpgroupRows, Config::kKeys>;
  static constexpr bool kHasOverlay = Config::kOverlay != Terms::none;
  using RingOverlay = Ring<kHasOverlay ? Config::kStagesOverlay : 1>;
  // What thread blocks of a cluster send each other: a ring's full buffers are with the receiver, and the barriers of
  // its empty ones with the sender. P of a warp, in binary16: its 16 rows of a block of keys.
  using RingP = Ring<2>;
  static constexpr int kWarps = 4 * Config::kWarpgroups, kPBytes = 16 * Config::kKeys * 2;
  static_assert(O::kBytes <= Q::kBytes);
  // One tile is being finished, the next one's Q may be there, and the one after that is known to the loading warp.
  using Tiles = NumberedBuffers<3>;

  // What products read doubled comes first, as in BackwardMemory.
  static constexpr int kSelectors = 0, kStatistics = Config::kHasStatistics ? kSelectorsBytes : 0;
  static constexpr int kStatisticsBytes = Config::kHasStatistics ? Config::kKeys * 16 : 0;  // of a stage of K
  static constexpr int kWork = kStatistics + Config::kStagesK * kStatisticsBytes;
  static constexpr int kBlocksBytes = static_cast<int>(sizeof(KeyBlocks<int>));
  static constexpr int kWorkBytes = static_cast<int>(sizeof(Work)) + (Config::kWarpgroups + 1) * kBlocksBytes;
  static constexpr int kBarriers = kWork + Tiles::kCount * kWorkBytes;
  static constexpr int kRingK = kBarriers + RingQ::kBytes, kRingV = kRingK + RingK::kBytes;
  static constexpr int kOutFull = kRingV + RingV::kBytes, kTail = kOutFull + 8 * Config::kStagesQ;
  static constexpr int kTurns = kTail + 8, kRingDout = kTurns + 8 * Config::kWarpgroups;
  static constexpr int kRingP = kRingDout + (Config::kHasDout ? RingQ::kBytes : 0);
  static constexpr int kRingTickets = kRingP + (Config::kFromKeys ? kWarps * RingP::kBytes : 0);
  static constexpr int kRingOverlay = kRingTickets + (Config::kFromKeys ? RingP::kBytes : 0);
  static constexpr int kTickets =
      (kRingOverlay + (kHasOverlay ? Config::kWarpgroups * RingOverlay::kBytes : 0) + 15) / 16 * 16;
  // The rows of a tile: Q, and behind it dO where there is one.
  static constexpr int kQ = (kTickets + (Config::kFromKeys ? RingP::kStages * 16 : 0) + 1023) / 1024 * 1024;
  static constexpr int kQBytes = Config::kWarpgroups * Q::kBytes * (Config::kHasDout ? 2 : 1);
  static constexpr int kK = kQ + Config::kStagesQ * kQBytes, kV = kK + Config::kStagesK * K::kBytes;
  static constexpr int kP = kV + Config::kStagesV * V::kBytes;
  static constexpr int kOverlay = kP + (Config::kFromKeys ? RingP::kStages * kWarps * kPBytes : 0);
  static constexpr int kBytes = kOverlay + Config::kWarpgroups * Config::kStagesOverlay * Overlay::kBytes;
  static_assert(kBytes <= 227 * 1024);

  uint32_t base;

  // The same, for operands that do not change from step to step: told that they do not, the compiler would keep their
  // descriptors, in registers that there are not.
  __device__ __forceinline__ ForwardMemory unknown() const { return {opaque(base)}; }

  __device__ Q q(int stage, int warpgroup) const { return {base + kQ + stage * kQBytes + warpgroup * Q::kBytes}; }
  __device__ Q dout(int stage, int warpgroup) const { return q(stage, Config::kWarpgroups + warpgroup); }
  __device__ O o(int stage, int warpgroup) const { return {q(stage, warpgroup).base}; }
  __device__ K k(int stage) const { return {base + kK + stage * K::kBytes}; }
  __device__ V v(int stage) const { return {base + kV + stage * V::kBytes}; }
  __device__ Overlay overlay(int stage, int warpgroup) const {
    return {base + kOverlay + (stage * Config::kWarpgroups + warpgroup) * Overlay::kBytes};
  }
  __device__ uint32_t lse_selector() const { return base + kSelectors; }
  __device__ uint32_t delta_selector() const { return base + kSelectors + 128; }
  __device__ uint32_t statistics(int stage) const { return base + kStatistics + stage * kStatisticsBytes; }
  __device__ RingQ ring_q(unsigned tile = 0) const { return RingQ(base + kBarriers, tile); }
  __device__ RingQ ring_dout(unsigned tile = 0) const { return RingQ(base + kRingDout, tile); }
  __device__ RingK ring_k() const { return RingK(base + kRingK); }
  __device__ RingV ring_v() const { return RingV(base + kRingV); }
  __device__ RingOverlay ring_overlay(int warpgroup, unsigned number = 0) const {
    return RingOverlay(base + kRingOverlay + warpgroup * RingOverlay::kBytes, number);
  }
  __device__ RingP ring_p(int warp) const { return RingP(base + kRingP + warp * RingP::kBytes); }
  __device__ RingP ring_tickets() const { return RingP(base + kRingTickets); }
  __device__ uint32_t p(int stage, int warp) const { return base + kP + (stage * kWarps + warp) * kPBytes; }
  __device__ uint32_t ticket(int stage) const { return base + kTickets + 16 * stage; }
  // O is complete in the place of Q; rows of K or V have arrived, of which some must be cleared.
  __device__ uint32_t out_full(int stage) const { return base + kOutFull + 8 * stage; }
  __device__ uint32_t tail_full() const { return base + kTail; }
  // The warpgroup before has had its turn.
  __device__ uint32_t turn(int warpgroup) const { return base + kTurns + 8 * warpgroup; }

  __device__ void init_barriers() const {
    ring_q().init(1, (Config::kStoresByCopy ? 1 : 4 * Config::kWarpgroups) + (kHasOverlay ? 1 : 0));
    ring_k().init(1, 4 * Config::kWarpgroups);
    ring_v().init(1, 4 * Config::kWarpgroups);
    for (int i = 0; i < Config::kStagesQ; ++i) init_barrier(out_full(i), 4 * Config::kWarpgroups);
    init_barrier(tail_full(), 1);
    for (int i = 0; i < Config::kWarpgroups; ++i) init_barrier(turn(i), 4);
    for (int i = 0; kHasOverlay && i < Config::kWarpgroups; ++i) ring_overlay(i).init(1, 4);
    if (Config::kHasDout) ring_dout().init(1, 4 * Config::kWarpgroups);
    if (Config::kFromKeys) {
      for (int i = 0; i < kWarps; ++i) ring_p(i).init(1, 1);
      ring_tickets().init(1, 1);
    }
    fence_barrier_init();
  }

  __device__ void write_work(unsigned tile, const Work& work) const { write_struct(work_address(tile), work); }
  __device__ __forceinline__ Work read_work(unsigned tile) const { return read_struct<Work>(work_address(tile)); }

  // Key blocks that rows of a warpgroup see; of number kWarpgroups: that rows of any see.
  __device__ void write_blocks(unsigned tile, int warpgroup, const KeyBlocks<int>& blocks) const {
    write_struct(blocks_address(tile, warpgroup), blocks);
  }
  __device__ __forceinline__ KeyBlocks<int> read_blocks(unsigned tile, int warpgroup) const {
    return read_struct<KeyBlocks<int>>(blocks_address(tile, warpgroup));
  }

 private:
  __device__ uint32_t work_address(unsigned tile) const { return base + kWork + Tiles::stage(tile) * kWorkBytes; }
  __device__ uint32_t blocks_address(unsigned tile, int warpgroup) const {
    return work_address(tile) + static_cast<int>(sizeof(Work)) + warpgroup * kBlocksBytes;
  }
};

}  // namespace fae::sm90
