#pragma once

#include <type_traits>

#include "../core/schedule.h"
#include "../cuda/device.h"
#include "../cuda/terms.h"

// Tile sizes. Head dims up to a tile's are filled with zeros by the copies.

namespace fae::sm90 {

using cuda::Terms;

template <DType kType>
using ElementOf = std::conditional_t<kType == DType::bfloat16, __nv_bfloat16, __half>;

constexpr int kWarpgroupThreads = 128, kWarpgroupRows = 64;

// A thread block is one warpgroup that moves data and kWarpgroups that compute, each with 64 rows of Q. kStages*: tiles
// of Q, and of K and V, in shared memory.
template <int kWarpgroups_, int kKeys_, int kDim_, int kDimV_, int kStagesQ_, int kStagesK_, int kStagesV_>
struct ForwardTile {
  static constexpr int kWarpgroups = kWarpgroups_, kKeys = kKeys_, kDim = kDim_, kDimV = kDimV_;
  static constexpr int kStagesQ = kStagesQ_, kStagesK = kStagesK_, kStagesV = kStagesV_;
  // What lies over the scores and comes with them (overlay.h), and stages of a warpgroup's rows of it.
  static constexpr Terms kOverlay = Terms::none;
  static constexpr int kStagesOverlay = 0;
  // A tile has rows of one head, or the same rows of several heads.
  static constexpr int kHeads = 1, kHeadWarpgroups = kWarpgroups;
  static constexpr int kRows = kHeadWarpgroups * kWarpgroupRows, kThreads = (kWarpgroups + 1) * kWarpgroupThreads;
  // Warpgroups start their products in turn, so that one computes scores while another multiplies: by themselves they
  // fall into step, and do neither beside the other. Measured to help here alone.
  static constexpr bool kTakesTurns = kDim == 128 || kKeys == 128;
  // Kernels for one gradient are made of the same parts.
  static constexpr bool kFromKeys = false, kHasDout = false, kHasStatistics = false, kClearsK = false;
  static constexpr bool kLatePv = true;     // V is used a block later than K
  static constexpr bool kPlansLate = true;  // a tile is drawn shortly before it begins
  // O leaves by way of the place that its Q has had. Where that is the only place, the Q of the next tile would have to
  // wait for it: then threads store O, and Q gives its place up when the last scores are there.
  static constexpr bool kStoresByCopy = kStagesQ > 1;

  // Registers of a thread. All threads together start with what the block may have, 168, 128 or 96 each, and must not
  // ask for more: the block would wait forever.
  static constexpr int kMoverRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kComputeRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112;
  static_assert(kWarpgroups >= 2 && kWarpgroups <= 4);
  static_assert(kMoverRegisters + kWarpgroups * kComputeRegisters <= (kWarpgroups + 1) * (kWarpgroups == 2   ? 168
                                                                                          : kWarpgroups == 3 ? 128
                                                                                                             : 96));
};

template <class Tile, Terms kOverlay_, int kStages>
struct WithOverlay : Tile {
  static constexpr Terms kOverlay = kOverlay_;
  static constexpr int kStagesOverlay = kStages;
};

// Terms need registers: smaller tiles, or fewer warpgroups.
template <int kHeadDim, Terms kTerms>
struct ForwardConfig;

// Head dim 64: the more keys a block, the less often a warp waits, counts and describes operands, which is a third of
// its instructions with 64 keys; but there are registers for more only without a fourth warpgroup.
template <Terms kTerms>
struct ForwardConfig<64, kTerms> : ForwardTile<3, 64, 64, 64, 2, 4, 4> {};
template <>
struct ForwardConfig<64, Terms::alibi> : ForwardTile<3, 128, 64, 64, 2, 4, 4> {};
template <>
struct ForwardConfig<64, Terms::dropout> : ForwardTile<3, 128, 64, 64, 2, 4, 4> {};
template <>
struct ForwardConfig<64, Terms::bias> : WithOverlay<ForwardTile<3, 128, 64, 64, 2, 2, 2>, Terms::bias, 2> {};
template <>
struct ForwardConfig<64, Terms::mask> : WithOverlay<ForwardTile<3, 128, 64, 64, 2, 3, 3>, Terms::mask, 3> {};

// Tiles of 192 rows and 128 keys were measured for plain scores, too: they gain nothing in the mean.
template <>
struct ForwardConfig<64, Terms::none> : ForwardTile<4, 64, 64, 64, 2, 6, 6> {};

template <Terms kTerms>
struct ForwardConfig<128, kTerms> : ForwardTile<2, 128, 128, 128, 2, 3, 2> {};
template <>
struct ForwardConfig<128, Terms::any> : ForwardTile<2, 64, 128, 128, 2, 4, 4> {};
template <>
struct ForwardConfig<128, Terms::bias> : WithOverlay<ForwardTile<2, 128, 128, 128, 2, 2, 2>, Terms::bias, 1> {};
template <>
struct ForwardConfig<128, Terms::mask> : WithOverlay<ForwardTile<2, 128, 128, 128, 2, 2, 2>, Terms::mask, 2> {};
// More keys a block were measured to be slower, for shorter sequences by far.
template <Terms kTerms>
struct ForwardConfig<192, kTerms> : ForwardTile<2, 64, 192, 192, 2, 3, 2> {};
template <Terms kTerms>
struct ForwardConfig<256, kTerms> : ForwardTile<2, 64, 256, 256, 1, 3, 2> {};

// Two heads a tile, for sequences so short that half of a tile's rows would be empty.
struct TwoHeadsTile : ForwardConfig<64, Terms::none> {
  static constexpr int kHeads = 2, kHeadWarpgroups = kWarpgroups / kHeads;
  static constexpr int kRows = kHeadWarpgroups * kWarpgroupRows;
};

// A kernel for dQ, or one for dK and dV (backward_separate.h). From the keys, queries and keys change places: what is
// called Q here is K, or V where a thread block has dK; kKeys are rows of Q and dO; only dQ has dO beside Q.
template <int kDim, bool kFromKeys_, int kStagesK, int kStagesV>
struct GradientTile : ForwardTile<2, 64, kDim, kDim, 1, kStagesK, kStagesV> {
  static constexpr bool kFromKeys = kFromKeys_, kHasStatistics = kFromKeys;
  static constexpr bool kHasDout = !kFromKeys, kClearsK = true, kLatePv = kFromKeys;
  static constexpr bool kPlansLate = false;  // few stages: products would wait for the plan; measured at 0.88 to 1.02
};
template <int kHeadDim, bool kFromKeys>
struct GradientConfig;
template <bool kFromKeys>
struct GradientConfig<192, kFromKeys> : GradientTile<192, kFromKeys, 3, 2> {};
template <>
struct GradientConfig<256, false> : GradientTile<256, false, 2, 1> {};
template <>
struct GradientConfig<256, true> : GradientTile<256, true, 2, 2> {};

// A thread block of the backward: one warpgroup that moves data and two that compute. kRows: of a query block.
template <int kRows_, int kKeys_, int kDim_>
struct BackwardBlock {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kKeyPieces = kKeys / kWarpgroupRows, kDim = kDim_;
  static constexpr int kStages = 2, kStagesQ = 2;  // of dO, and of the dS of query blocks; of Q, in shared memory
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * kWarpgroupThreads;
  static constexpr bool kSeparate = false;
  static constexpr bool kGoesRound = false;       // where all rows see all keys (core/schedule.h, Round)
  static constexpr Terms kOverlay = Terms::none;  // overlay.h

  // Rows up to which one task walks through all query heads that share its keys, instead of a task for each of them:
  // those would wait for each other longer than they save. H200, causal, TFLOP/s with one and with several tasks:
  // D 64, 1024 rows 310, 267; 4096 rows 368, 413; D 128, 512 rows 215, 197; 1024 rows
  // 304, 310; D 256, 512 rows (4 heads) 203, 183; 1024 rows 239, 242.
  static constexpr int kFewRows = kDim == 64 ? 1024 : 512;

  // By how many rows the first query block of a sequence begins before it. Where blocks of keys do not end with query
  // blocks, those end with the sequence: its last rows, which under a causal mask all keys see, fill their block.
  FAE_INLINE static int rows_before(int seqlen_q) {
    return kKeys % kRows == 0 ? 0 : ceil_div(seqlen_q, kRows) * kRows - seqlen_q;
  }

  // The rows of a place for sums of dQ. Where a block begins before its sequence, those that have no row of that don't
  // exist.
  static constexpr int kPlaceRows = kKeys % kRows == 0 ? kRows : 16;
  static_assert(kRows % kPlaceRows == 0);

  static constexpr int kMoverRegisters = 24, kComputeRegisters = 240;
  static_assert(kMoverRegisters + kWarpgroups * kComputeRegisters <= 3 * 168);
};

// Each warpgroup has 64 of the keys, with dK and dV.
template <int kRows, int kDim>
struct BackwardTile : BackwardBlock<kRows, 2 * kWarpgroupRows, kDim> {
  static constexpr bool kWide = false;
  // Of two Qs, the next one comes when dK of the step before has been computed, which is too late.
  static constexpr int kStagesQ = 3;
  // dQ^T, [dim][rows], is shared out between the warpgroups by columns of K, 64 each, or else by rows.
  static constexpr bool kSharesDim = kDim == 2 * 64;
  static constexpr bool kGoesRound = kDim == 128;  // head dim 64 was measured to gain nothing
  static constexpr int kQueryRows = kSharesDim ? kRows : kRows / 2;
  static constexpr int kEarlyParts =
      kDim == 64 ? kRows / 16 : 1;  // of 16 rows, whose general P is computed while dP is
  static_assert(kSharesDim || kDim == 64);
};

// One warpgroup has dV of all keys, the other one dK: there are no registers for both.
template <int kDim>
struct WideBackwardTile : BackwardBlock<64, kWarpgroupRows, kDim> {
  static constexpr bool kWide = true;
  static constexpr int kScoreRows = WideBackwardTile::kRows / 2;  // a warpgroup's share of the scores
  static constexpr int kQueryCols = kDim / 2;                     // and of dQ
};

// Separate kernels: what their workspace follows from.
template <int kDim>
struct SeparateBackward : BackwardBlock<64, 2 * kWarpgroupRows, kDim> {
  static constexpr bool kWide = false, kSeparate = true;
};

template <int kRows, int kDim, Terms kOverlay_>
struct BackwardOverlayTile : BackwardTile<kRows, kDim> {
  static constexpr Terms kOverlay = kOverlay_;
};

template <int kHeadDim, Terms kTerms>
struct BackwardConfig;
template <Terms kTerms>
struct BackwardConfig<64, kTerms> : BackwardTile<64, 64> {};
template <>
struct BackwardConfig<64, Terms::none> : BackwardTile<128, 64> {};
template <>
struct BackwardConfig<64, Terms::alibi> : BackwardTile<128, 64> {};
template <>
struct BackwardConfig<64, Terms::bias> : BackwardOverlayTile<64, 64, Terms::bias> {};
template <>
struct BackwardConfig<64, Terms::mask> : BackwardOverlayTile<128, 64, Terms::mask> {};
template <Terms kTerms>
struct BackwardConfig<128, kTerms> : BackwardTile<80, 128> {};
template <>
struct BackwardConfig<128, Terms::softcap> : BackwardTile<64, 128> {};
template <>
struct BackwardConfig<128, Terms::dropout> : BackwardTile<64, 128> {};
template <>
struct BackwardConfig<128, Terms::bias> : BackwardOverlayTile<64, 128, Terms::bias> {};
template <>
struct BackwardConfig<128, Terms::mask> : BackwardOverlayTile<64, 128, Terms::mask> {};
template <>
struct BackwardConfig<128, Terms::any> : BackwardTile<64, 128> {};
template <Terms kTerms>
struct BackwardConfig<192, kTerms> : WideBackwardTile<192> {};
template <>
struct BackwardConfig<192, Terms::none> : SeparateBackward<192> {};
template <Terms kTerms>
struct BackwardConfig<256, kTerms> : WideBackwardTile<256> {};
template <>
struct BackwardConfig<256, Terms::none> : SeparateBackward<256> {};

// A thread block of the gradient of a bias that broadcasts: one warpgroup that moves data and two that compute, each
// with 64 rows of a tile. kStages: of rows (Q, dO), and of keys (K, V), in shared memory.
template <int kKeys_, int kDim_, int kStages_>
struct BiasGradientTile {
  static constexpr int kWarpgroups = 2, kThreads = (kWarpgroups + 1) * kWarpgroupThreads;
  static constexpr int kRows = kWarpgroups * kWarpgroupRows, kKeys = kKeys_, kDim = kDim_, kStages = kStages_;
  static constexpr int kMoverRegisters = 40, kComputeRegisters = 232;
  static_assert(kMoverRegisters + kWarpgroups * kComputeRegisters <= 3 * 168);
};

template <int kHeadDim>
struct BiasGradientConfig;
template <>
struct BiasGradientConfig<64> : BiasGradientTile<128, 64, 6> {};
template <>
struct BiasGradientConfig<128> : BiasGradientTile<128, 128, 3> {};
template <>
struct BiasGradientConfig<192> : BiasGradientTile<64, 192, 2> {};
template <>
struct BiasGradientConfig<256> : BiasGradientTile<64, 256, 2> {};

}  // namespace fae::sm90
