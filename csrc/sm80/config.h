#pragma once

#include "tile.h"

// Tile sizes. Head dims up to a tile's are filled with zeros; 512 is for all above 256.

namespace fae::sm80 {

// kDim: columns of Q and K in shared memory. kDimV: columns of V and O per thread block; where there are more, several
// blocks share a task and each computes the scores anew.
template <int kRows_, int kKeys_, int kWarps_, int kDim_, int kDimV_ = kDim_, int kStages_ = 2,
          bool kQueryInRegisters_ = false>
struct ForwardTile {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_, kDim = kDim_, kDimV = kDimV_;
  static constexpr int kStages = kStages_;  // blocks of K and V in shared memory
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr int kThreads = kWarps * cuda::kWarpThreads, kWarpRows = kRows / kWarps;
};

// 32 rows per warp, so that a fragment of K or V serves two products; 32 keys where O takes half of the registers;
// shared memory within the 99 KB of the smaller GPUs (8.6, 8.9, 12.0).
template <class T, int kHeadDim>
struct ForwardConfig;
template <class T>
struct ForwardConfig<T, 64> : ForwardTile<128, 64, 4, 64, 64, 2, true> {};
template <class T>
struct ForwardConfig<T, 128> : ForwardTile<128, 32, 4, 128> {};
template <class T>
struct ForwardConfig<T, 192> : ForwardTile<64, 32, 4, 192> {};
template <class T>
struct ForwardConfig<T, 256> : ForwardTile<64, 32, 4, 256> {};
template <class T>
struct ForwardConfig<T, 512> : ForwardTile<64, 16, 4, 512, 256, 1> {};

// float takes twice the memory, and three products and the splitting of factors for one.
template <>
struct ForwardConfig<float, 64> : ForwardTile<128, 32, 4, 64> {};
template <>
struct ForwardConfig<float, 128> : ForwardTile<128, 16, 4, 128> {};
template <>
struct ForwardConfig<float, 192> : ForwardTile<32, 16, 2, 192> {};
template <>
struct ForwardConfig<float, 256> : ForwardTile<32, 16, 2, 256> {};
template <>
struct ForwardConfig<float, 512> : ForwardTile<16, 16, 1, 512, 256, 1> {};

// General scores need registers for their terms.
template <class T, int kHeadDim>
using GeneralForwardConfig =
    std::conditional_t<kHeadDim == 64 && sizeof(T) == 2, ForwardTile<128, 32, 4, 64>, ForwardConfig<T, kHeadDim>>;

// Backward: a thread block keeps kKeys keys and walks blocks of kRows query rows. Its warps share each product in a
// grid of their own: k*RowWarps of them along the rows of the result, the others along its columns.
template <int kRows_, int kKeys_, int kDim_, int kStages_, int kScoreRowWarps_, int kScoreColWarps_, int kKeyRowWarps_,
          int kQueryRowWarps_>
struct BackwardTile {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kDim = kDim_, kStages = kStages_;
  static constexpr int kWarps = 8, kThreads = kWarps * cuda::kWarpThreads;
  static constexpr int kScoreRowWarps = kScoreRowWarps_, kScoreColWarps = kScoreColWarps_;  // S, dP: rows x keys
  static constexpr int kKeyRowWarps = kKeyRowWarps_;                                        // dK, dV: keys x dim
  static constexpr int kQueryRowWarps = kQueryRowWarps_;                                    // dQ: rows x dim
};

template <class T, int kHeadDim>
struct BackwardConfig;
template <class T>
struct BackwardConfig<T, 64> : BackwardTile<64, 128, 64, 2, 2, 4, 4, 4> {};
template <class T>
struct BackwardConfig<T, 128> : BackwardTile<64, 64, 128, 1, 2, 4, 2, 2> {};
template <class T>
struct BackwardConfig<T, 192> : BackwardTile<32, 64, 192, 1, 2, 4, 4, 2> {};
template <class T>
struct BackwardConfig<T, 256> : BackwardTile<32, 32, 256, 1, 2, 2, 2, 2> {};
template <class T>
struct BackwardConfig<T, 512> : BackwardTile<16, 16, 512, 1, 1, 1, 1, 1> {};

template <>
struct BackwardConfig<float, 64> : BackwardTile<64, 64, 64, 1, 2, 4, 4, 4> {};
template <>
struct BackwardConfig<float, 128> : BackwardTile<32, 32, 128, 1, 2, 2, 2, 2> {};
template <>
struct BackwardConfig<float, 192> : BackwardTile<16, 32, 192, 1, 1, 2, 2, 1> {};
template <>
struct BackwardConfig<float, 256> : BackwardTile<16, 16, 256, 1, 1, 1, 1, 1> {};
template <>
struct BackwardConfig<float, 512> : BackwardTile<16, 16, 512, 1, 1, 1, 1, 1> {};

}  // namespace fae::sm80
