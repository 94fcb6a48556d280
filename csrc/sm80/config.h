#pragma once

#include "tile.h"

// Tile sizes. Head dims up to a tile's are filled with zeros; 512 is for all above 256.

namespace fae::sm80 {

// kDim: columns of Q and K in shared memory. kDimV: columns of V and O per thread block; where there are more, several
// blocks share a task and each computes the scores anew.
template <int kRows_, int kKeys_, int kWarps_, int kDim_, int kDimV_ = kDim_, int kStages_ = 2>
struct ForwardTile {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_, kDim = kDim_, kDimV = kDimV_;
  static constexpr int kStages = kStages_;  // blocks of K and V in shared memory
  static constexpr int kThreads = kWarps * cuda::kWarpThreads, kWarpRows = kRows / kWarps;
};

// 32 rows per warp, so that a fragment of K or V serves two products, where O then leaves registers for the rest (at
// 128 columns it spills); shared memory within the 99 KB of the smaller GPUs (8.6, 8.9, 12.0).
template <class T, int kHeadDim>
struct ForwardConfig;
template <class T>
struct ForwardConfig<T, 64> : ForwardTile<128, 64, 4, 64> {};
template <class T>
struct ForwardConfig<T, 128> : ForwardTile<128, 64, 8, 128> {};
template <class T>
struct ForwardConfig<T, 192> : ForwardTile<64, 32, 4, 192> {};
template <class T>
struct ForwardConfig<T, 256> : ForwardTile<64, 32, 4, 256> {};
template <class T>
struct ForwardConfig<T, 512> : ForwardTile<64, 16, 4, 512, 256, 1> {};

// float takes twice the memory.
template <>
struct ForwardConfig<float, 64> : ForwardTile<64, 64, 4, 64> {};
template <>
struct ForwardConfig<float, 128> : ForwardTile<64, 32, 4, 128> {};
template <>
struct ForwardConfig<float, 192> : ForwardTile<32, 16, 2, 192> {};
template <>
struct ForwardConfig<float, 256> : ForwardTile<32, 16, 2, 256> {};
template <>
struct ForwardConfig<float, 512> : ForwardTile<16, 16, 1, 512, 256, 1> {};

// Backward: a thread block keeps kKeys keys and walks blocks of kRows query rows. Its warps share each product in a
// grid of their own: k*Warps of them along the rows of the result, the others along its columns.
template <int kRows_, int kKeys_, int kDim_, int kWarps_, int kBlocksPerSM_, int kStages_, int kSubRows_,
          int kScoreKeyWarps_, int kScoreRowWarps_, int kKeyRowWarps_, int kQueryRowWarps_>
struct BackwardTile {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kDim = kDim_, kStages = kStages_, kSubRows = kSubRows_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * cuda::kWarpThreads, kBlocksPerSM = kBlocksPerSM_;
  static constexpr int kScoreKeyWarps = kScoreKeyWarps_, kScoreRowWarps = kScoreRowWarps_;  // S^T, dP^T: keys x rows
  static constexpr int kKeyRowWarps = kKeyRowWarps_;                                        // dK, dV: keys x dim
  static constexpr int kQueryRowWarps = kQueryRowWarps_;                                    // dQ: rows x dim
  // A warp has all rows of its keys: P and dS are operands of dV and dK in the registers that they are computed in.
  static constexpr bool kInRegisters = kScoreRowWarps == 1 && kScoreKeyWarps == kWarps && kKeyRowWarps == kWarps;
  // A step is finished while the next one is computed.
  static constexpr bool kLag = kStages >= (kInRegisters ? 2 : 3);
  static constexpr int kBuffers = kLag ? 2 : 1;  // of what passes through shared memory
  static_assert(kLag || kStages == 1);
  static_assert(kInRegisters || kSubRows == kRows);
};

template <class T, int kHeadDim>
struct BackwardConfig;
#ifndef D64
#define D64 64, 128, 64, 4, 2, 2, 32, 4, 1, 4, 2
#endif
#ifndef D128
#define D128 64, 128, 128, 8, 1, 3, 64, 4, 2, 2, 2
#endif
template <class T>
struct BackwardConfig<T, 64> : BackwardTile<D64> {};
template <class T>
struct BackwardConfig<T, 128> : BackwardTile<D128> {};
template <class T>
struct BackwardConfig<T, 192> : BackwardTile<32, 64, 192, 8, 1, 1, 32, 4, 2, 4, 2> {};
template <class T>
struct BackwardConfig<T, 256> : BackwardTile<32, 32, 256, 8, 1, 1, 32, 2, 2, 2, 2> {};
template <class T>
struct BackwardConfig<T, 512> : BackwardTile<16, 16, 512, 8, 1, 1, 16, 1, 1, 1, 1> {};

template <>
struct BackwardConfig<float, 64> : BackwardTile<64, 64, 64, 8, 1, 1, 64, 4, 2, 4, 4> {};
template <>
struct BackwardConfig<float, 128> : BackwardTile<32, 32, 128, 8, 1, 1, 32, 2, 2, 2, 2> {};
template <>
struct BackwardConfig<float, 192> : BackwardTile<16, 32, 192, 8, 1, 1, 16, 2, 1, 2, 1> {};
template <>
struct BackwardConfig<float, 256> : BackwardTile<16, 16, 256, 8, 1, 1, 16, 1, 1, 1, 1> {};
template <>
struct BackwardConfig<float, 512> : BackwardTile<16, 16, 512, 8, 1, 1, 16, 1, 1, 1, 1> {};

// The gradient of a bias that broadcasts needs no products after S and dP.
template <class T, int kHeadDim>
struct BiasGradientConfig : BackwardConfig<T, kHeadDim> {};
template <class T>
struct BiasGradientConfig<T, 64> : BackwardTile<64, 64, 64, 8, 1, 1, 64, 4, 2, 4, 4> {};
template <class T>
struct BiasGradientConfig<T, 128> : BackwardTile<64, 64, 128, 8, 1, 1, 64, 4, 2, 4, 2> {};
template <>
struct BiasGradientConfig<float, 64> : BackwardConfig<float, 64> {};
template <>
struct BiasGradientConfig<float, 128> : BackwardConfig<float, 128> {};

}  // namespace fae::sm80
