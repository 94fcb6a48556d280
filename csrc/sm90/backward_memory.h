#pragma once

#include "../core/schedule.h"
#include "../cuda/score_terms.h"
#include "config.h"
#include "overlay.h"
#include "pipeline.h"
#include "tile.h"

// What the warps of a thread block of the backward share.

namespace fae::sm90 {

// One call: the problem and what the host has worked out about it.
struct BackwardCall {
  BackwardProblem p;
  cuda::Tasks tasks;                      // (batch, query head or first of those that share keys, block of keys)
  PackedBlocks query_places, key_blocks;  // packed tensors; places: of sums of dQ (Config::kPlaceRows)
  int query_places_per_head, key_blocks_per_head;
  unsigned long long* ticket;  // of tasks taken
  int* turns;                  // [head or batch x head][a query block's last place]: visitors that are done
  float* dq_partial;           // [head or batch x head][place]: sums, in the order of the threads that hold them
  int* waves;                  // [head or batch x head][a wave's first key block]: Wave; null: blocks don't go round
  int* key_turns;              // [KV head or batch x KV head][key block][warp]: query heads that are done
  float* dkv_partial;          // the same by block, as dq_partial
  cuda::ScoreConstants constants;
  bool direct_dbias;  // dS is the gradient of a bias, element by element
  TensorMap q, k, v, dout;
  TensorMap statistics;      // cuda/delta.h, RowStatistics
  TensorMap overlay, dbias;  // dbias: where direct_dbias
  int statistics_group_bits;
};

// A task, a block of keys for one query head or all that share them, on its way from the loading warp to those that
// compute.
struct alignas(16) KeyBlock {
  int batch = 0, head_kv = 0, key_begin = 0, steps = 0;  // batch -1: there are no more
  int q_start = 0, k_start = 0;
  cuda::DeviceBand band = {};
  int slot = 0;   // of the block's dK and dV
  int flags = 0;  // and from kRank on the number of query heads before that add to them

  // kAgain: dK and dV are with another task, this one makes up for visits to dQ (backward_movers.h).
  static constexpr int kLastHead = 1, kAgain = 2, kRank = 2;
  __device__ int rank() const { return flags >> kRank; }
  __device__ bool again() const { return flags & kAgain; }
  __device__ bool last_head() const { return flags & kLastHead; }
};

// A query block that meets the keys, and this visit's place among those to the query block's dQ.
struct alignas(16) Step {
  int row_begin = 0, head = 0;
  int last_place = 0;  // of the query block, whose first ones may not exist; -1: there are no more
  int flags = 0;       // and the visit's number from kRank on

  // kEdge << piece: some row does not see all of these 64 keys. kNoVisit: another task makes up for it.
  static constexpr int kLastVisit = 1, kEdge = 2, kNoVisit = 8, kRank = 4;
  __device__ int rank() const { return flags >> kRank; }
  __device__ bool last_visit() const { return flags & kLastVisit; }
  __device__ bool no_visit() const { return flags & kNoVisit; }
  __device__ bool is_edge(int piece) const { return flags >> piece & kEdge; }
};

template <class T, class Config>
struct BackwardMemory {
  using K = SharedTile<T, kWarpgroupRows, Config::kDim>;  // 64 of the keys
  using Q = SharedTile<T, Config::kRows, Config::kDim>;
  // What the warpgroups exchange: dS, rows by keys, or (wide) P and dS, keys by rows.
  using DS = std::conditional_t<Config::kWide, SharedTile<T, Config::kKeys, Config::kRows>,
                                SharedTile<T, Config::kRows, Config::kKeys>>;
  static constexpr int kExchangedBytes = (Config::kWide ? 2 : 1) * DS::kBytes;
  using Overlay = OverlayTile<T, Config::kOverlay, Config::kRows, Config::kKeys>;
  static constexpr bool kHasOverlay = Config::kOverlay != Terms::none, kStoresDbias = Config::kOverlay == Terms::bias;
  static constexpr int kOverlayBytes = kHasOverlay ? Overlay::kBytes : 0;
  static constexpr int kDoutBytes = Q::kBytes + kOverlayBytes;  // of a stage: an overlay comes, and goes, with dO
  using Buffers = NumberedBuffers<Config::kStages>;
  using QueryBuffers = NumberedBuffers<Config::kStagesQ>;  // of Q and the statistics
  static constexpr int kStepStages = 4;                    // a step is looked at once more during the next
  static_assert(kStepStages > Config::kStagesQ);
  static_assert(Config::kKeyPieces <= 2, "Step::kEdge << piece is a bit of its own");
  using StepBuffers = NumberedBuffers<kStepStages>;

  // What products read doubled comes first: compute-sanitizer takes them to read as many bytes as others do, and there
  // have to be as many behind it.
  static constexpr int kKeysBytes = Config::kKeyPieces * K::kBytes, kStatisticsBytes = Config::kRows * 16;
  static constexpr int kSelectors = 0, kStatistics = kSelectorsBytes;
  static constexpr int kKeyBlock = kStatistics + Config::kStagesQ * kStatisticsBytes;
  static constexpr int kSteps = kKeyBlock + static_cast<int>(sizeof(KeyBlock));
  static constexpr int kBarriers = kSteps + kStepStages * static_cast<int>(sizeof(Step));
  static constexpr int kDoutBarriers = 6 + 2 * Config::kStagesQ, kTurns = kDoutBarriers + 4 * Config::kStages;
  static constexpr int kK = (kBarriers + 8 * (kTurns + 2 * kStepStages) + 1023) / 1024 * 1024;
  static constexpr int kV = kK + kKeysBytes, kQ = kV + kKeysBytes, kDout = kQ + Config::kStagesQ * Q::kBytes;
  static constexpr int kDS = kDout + Config::kStages * kDoutBytes, kBytes = kDS + Config::kStages * kExchangedBytes;
  static_assert(kBytes <= 227 * 1024);
  static_assert(kStatistics % 128 == 0 && kSelectors % 128 == 0);

  uint32_t base;

  // The same, for operands that do not change from step to step: told that they do not, the compiler would keep their
  // descriptors, in registers that there are not.
  __device__ __forceinline__ BackwardMemory unknown() const { return {opaque(base)}; }

  __device__ K k(int piece) const { return {base + kK + piece * K::kBytes}; }
  __device__ K v(int piece) const { return {base + kV + piece * K::kBytes}; }
  __device__ Q q(int stage) const { return {base + kQ + stage * Q::kBytes}; }
  __device__ Q dout(int stage) const { return {base + kDout + stage * kDoutBytes}; }
  __device__ Overlay overlay(int stage) const { return {dout(stage).base + Q::kBytes}; }
  __device__ DS ds(int stage) const { return {base + kDS + stage * kExchangedBytes}; }
  __device__ DS p(int stage) const { return {ds(stage).base + DS::kBytes}; }
  __device__ uint32_t statistics(int stage) const { return base + kStatistics + stage * kStatisticsBytes; }
  __device__ uint32_t lse_selector() const { return base + kSelectors; }
  __device__ uint32_t delta_selector() const { return base + kSelectors + 128; }
  __device__ uint32_t key_block() const { return base + kKeyBlock; }
  __device__ uint32_t step(unsigned number) const {
    return base + kSteps + StepBuffers::stage(number) * static_cast<int>(sizeof(Step));
  }

  // The key block and its K, and its V, are there; the key block is, and K and V are, no longer needed.
  __device__ uint32_t k_full() const { return barrier(0); }
  __device__ uint32_t v_full() const { return barrier(1); }
  __device__ uint32_t key_block_empty() const { return barrier(2); }
  __device__ uint32_t keys_empty() const { return barrier(3); }
  // Keys, and the tiles of a step, have arrived of which rows must be cleared.
  __device__ uint32_t keys_tail_full() const { return barrier(4); }
  __device__ uint32_t rows_tail_full() const { return barrier(5); }
  // Of a step: Q and the statistics are there; are no longer needed. The same of dO, and of what the warpgroups
  // exchange.
  __device__ uint32_t q_full(int stage) const { return barrier(6 + stage); }
  __device__ uint32_t q_empty(int stage) const { return barrier(6 + Config::kStagesQ + stage); }
  __device__ uint32_t dout_full(int stage) const { return barrier(kDoutBarriers + stage); }
  __device__ uint32_t dout_empty(int stage) const { return barrier(kDoutBarriers + Config::kStages + stage); }
  __device__ uint32_t ds_full(int stage) const { return barrier(kDoutBarriers + 2 * Config::kStages + stage); }
  __device__ uint32_t ds_empty(int stage) const { return barrier(kDoutBarriers + 3 * Config::kStages + stage); }
  // The step's visit to dQ may begin; is over. Those who keep the order can be ahead, or behind, by kStagesQ steps.
  __device__ uint32_t turn(unsigned number) const { return barrier(kTurns + StepBuffers::stage(number)); }
  __device__ uint32_t added(unsigned number) const {
    return barrier(kTurns + kStepStages + StepBuffers::stage(number));
  }

  __device__ void init_barriers() const {
    constexpr int kWarps = 4 * Config::kWarpgroups, kStores = kStoresDbias ? 1 : 0;
    for (const uint32_t one : {k_full(), v_full(), keys_tail_full(), rows_tail_full()}) init_barrier(one, 1);
    init_barrier(key_block_empty(), kWarps + kStores);
    init_barrier(keys_empty(), kWarps);
    for (int stage = 0; stage < Config::kStagesQ; ++stage) {
      init_barrier(q_full(stage), 1);
      init_barrier(q_empty(stage), kWarps + 2 + kStores);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      init_barrier(dout_full(stage), 1);
      init_barrier(dout_empty(stage), kWarps);
      init_barrier(ds_full(stage), kWarps);
      init_barrier(ds_empty(stage), kWarps + kStores);
    }
    for (int i = 0; i < kStepStages; ++i) {
      init_barrier(turn(i), 1);
      init_barrier(added(i), kWarps);
    }
    fence_barrier_init();
  }

 private:
  __device__ uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
};

}  // namespace fae::sm90
