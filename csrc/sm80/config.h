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
// grid of their own: k*Warps of them along the rows of the result, the others along its columns.
template <int kRows_, int kKeys_, int kDim_, int kWarps_, int kStages_, bool kLag_, int kScoreKeyWarps_,
          int kScoreRowWarps_, int kKeyRowWarps_, int kQueryRowWarps_, int kSubRows_ = kRows_>
struct BackwardTile {
  static constexpr int kRows = kRows_, kKeys = kKeys_, kDim = kDim_;
  static constexpr int kSubRows = kSubRows_;     // of which scores are computed at a time
  static constexpr int kStages = kStages_;       // blocks of Q and dO in shared memory
  static constexpr bool kLag = kLag_;            // a query block is finished while the next one is computed
  static constexpr int kBuffers = kLag ? 2 : 1;  // of what passes from warp to warp
  static constexpr int kWarps = kWarps_, kThreads = kWarps * cuda::kWarpThreads;
  static constexpr int kScoreKeyWarps = kScoreKeyWarps_, kScoreRowWarps = kScoreRowWarps_;  // S^T, dP^T: keys x rows
  static constexpr int kKeyRowWarps = kKeyRowWarps_;                                        // dK, dV: keys x dim
  static constexpr int kQueryRowWarps = kQueryRowWarps_;                                    // dQ: rows x dim
  // A warp has all rows of its keys: P and dS are operands of dV and dK in the registers that they are computed in.
  static constexpr bool kInRegisters = kScoreRowWarps == 1 && kScoreKeyWarps == kWarps && kKeyRowWarps == kWarps;
  static_assert(!kLag || kStages >= (kInRegisters ? 2 : 3));
};

// For 99 KB of shared memory (8.6, 8.9, 12.0). Per query block that a thread block visits, dQ goes through the
// second-level cache: the more keys, the better; 255 registers a thread hold dK and dV of 128 keys up to 128 columns.
template <class T, int kHeadDim>
struct BackwardConfig;
template <class T>
struct BackwardConfig<T, 64> : BackwardTile<64, 128, 64, 4, 2, false, 4, 1, 4, 2, 32> {};
template <class T>
struct BackwardConfig<T, 128> : BackwardTile<64, 64, 128, 4, 1, false, 2, 2, 2, 2> {};
template <class T>
struct BackwardConfig<T, 192> : BackwardTile<32, 64, 192, 8, 1, false, 4, 2, 4, 2> {};
template <class T>
struct BackwardConfig<T, 256> : BackwardTile<32, 32, 256, 8, 1, false, 2, 2, 2, 2> {};
template <class T>
struct BackwardConfig<T, 512> : BackwardTile<16, 16, 512, 8, 1, false, 1, 1, 1, 1> {};
template <>
struct BackwardConfig<float, 64> : BackwardTile<64, 64, 64, 8, 1, false, 4, 2, 4, 4> {};
template <>
struct BackwardConfig<float, 128> : BackwardTile<32, 32, 128, 8, 1, false, 2, 2, 2, 2> {};
template <>
struct BackwardConfig<float, 192> : BackwardTile<16, 32, 192, 8, 1, false, 2, 1, 2, 1> {};
template <>
struct BackwardConfig<float, 256> : BackwardTile<16, 16, 256, 8, 1, false, 1, 1, 1, 1> {};

// For 227 KB (9.0, 10.0). At 64 columns two thread blocks run on a multiprocessor.
template <class T, int kHeadDim>
struct LargeBackwardConfig : BackwardConfig<T, kHeadDim> {};
template <class T>
struct LargeBackwardConfig<T, 64> : BackwardTile<64, 128, 64, 4, 2, true, 4, 1, 4, 2, 32> {};
template <class T>
struct LargeBackwardConfig<T, 128> : BackwardTile<64, 128, 128, 8, 3, true, 4, 2, 2, 2> {};
template <class T>
struct LargeBackwardConfig<T, 192> : BackwardTile<64, 64, 192, 8, 3, true, 4, 2, 2, 2> {};
template <class T>
struct LargeBackwardConfig<T, 256> : BackwardTile<64, 64, 256, 8, 2, false, 4, 2, 2, 2> {};
template <>
struct LargeBackwardConfig<float, 64> : BackwardTile<64, 128, 64, 8, 2, false, 4, 2, 4, 4> {};
template <>
struct LargeBackwardConfig<float, 128> : BackwardTile<64, 64, 128, 8, 2, false, 4, 2, 2, 2> {};
template <>
struct LargeBackwardConfig<float, 192> : BackwardTile<32, 64, 192, 8, 1, false, 4, 2, 2, 2> {};
template <>
struct LargeBackwardConfig<float, 256> : BackwardTile<32, 32, 256, 8, 1, false, 2, 2, 2, 2> {};

// Score terms need registers of their own: more warps share a block.
template <class T, int kHeadDim>
struct GeneralBackwardConfig : BackwardConfig<T, kHeadDim> {};
template <class T>
struct GeneralBackwardConfig<T, 64> : BackwardTile<64, 128, 64, 8, 1, false, 4, 2, 4, 4> {};
template <class T>
struct GeneralBackwardConfig<T, 128> : BackwardTile<64, 64, 128, 8, 1, false, 4, 2, 2, 2> {};
template <>
struct GeneralBackwardConfig<float, 64> : BackwardConfig<float, 64> {};
template <>
struct GeneralBackwardConfig<float, 128> : BackwardConfig<float, 128> {};

template <class T, int kHeadDim>
struct LargeGeneralBackwardConfig : LargeBackwardConfig<T, kHeadDim> {};
template <class T>
struct LargeGeneralBackwardConfig<T, 64> : BackwardTile<64, 128, 64, 8, 3, true, 4, 2, 4, 4> {};
template <class T>
struct LargeGeneralBackwardConfig<T, 128> : BackwardTile<64, 64, 128, 8, 3, true, 4, 2, 2, 2> {};
template <>
struct LargeGeneralBackwardConfig<float, 64> : LargeBackwardConfig<float, 64> {};
template <>
struct LargeGeneralBackwardConfig<float, 128> : LargeBackwardConfig<float, 128> {};

// Gradient of a bias that broadcasts: blocks of scores, for which operands come anew every time, the larger the less of
// them per score. Up to 128 columns, S, dP and the sums of 32 keys x 32 rows per warp fit the registers of 12 warps,
// and two thread blocks of 6 the 164 KB of 8.0; the others are for 99 KB.
template <class T, int kHeadDim>
struct BiasGradientConfig : GeneralBackwardConfig<T, kHeadDim> {};
template <class T>
struct BiasGradientConfig<T, 64> : BackwardTile<64, 96, 64, 6, 1, false, 3, 2, 3, 2> {};
template <class T>
struct BiasGradientConfig<T, 128> : BackwardTile<64, 96, 128, 6, 1, false, 3, 2, 3, 2> {};
template <class T>
struct BiasGradientConfig<T, 192> : BackwardTile<64, 64, 192, 8, 1, false, 4, 2, 2, 2> {};
template <class T>
struct BiasGradientConfig<T, 256> : BackwardTile<32, 64, 256, 8, 1, false, 4, 2, 2, 2> {};
template <>
struct BiasGradientConfig<float, 64> : GeneralBackwardConfig<float, 64> {};
template <>
struct BiasGradientConfig<float, 128> : GeneralBackwardConfig<float, 128> {};
template <>
struct BiasGradientConfig<float, 192> : GeneralBackwardConfig<float, 192> {};
template <>
struct BiasGradientConfig<float, 256> : GeneralBackwardConfig<float, 256> {};

}  // namespace fae::sm80
