#pragma once

#include "../sm80/tile.h"
#include "ptx.h"

// Products of a warpgroup on tiles of shared memory. Its four warps have 16 rows each of the 64 rows of the result.

namespace fae::sm90 {

using cuda::Accumulator;
using cuda::lane_index;
using cuda::SharedTile;
using cuda::warp_index;

// Where wgmma finds an operand with the 128-byte swizzle. From eight rows (of an operand that is stored by columns:
// eight columns) to the next eight are 1024 bytes; leading: bytes from 64 columns (rows) to the next 64, where one
// product crosses those. Only the lower half changes from step to step. An address has 18 bits, and above them, in a
// cluster, the thread block's number.
class Descriptor {
 public:
  __device__ __forceinline__ Descriptor(uint32_t address, int leading = 16)
      : low_((address & 0x3ffff) >> 4 | static_cast<uint32_t>(leading >> 4) << 16) {}
  __device__ __forceinline__ uint64_t at(int bytes) const {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = 8 * cuda::kSwizzleBytes;
    return kSwizzle128 | kStride >> 4 << 32 | (low_ + (bytes >> 4));
  }
  // Worked out here, and not where it is used.
  __device__ __forceinline__ Descriptor now() const {
    Descriptor result = *this;
    result.low_ = opaque(low_);
    return result;
  }

 private:
  uint32_t low_;
};

// The same for rows of 16 bytes without swizzle, eight rows from the next, of which a product reads all 16 columns as
// the same eight twice.
__device__ __forceinline__ uint64_t doubled_descriptor(uint32_t address, int eight_rows) {
  return static_cast<uint64_t>(eight_rows >> 4) << 32 | (address & 0x3ffff) >> 4;
}

// S = A B^T, or S += A B^T, its steps only. A: 64 rows, B: 8 N rows, from b_row on, or where b0 says.
template <class A, class B, int N>
__device__ __forceinline__ void multiply_straight(Accumulator<1, N>& s, const A& a, const Descriptor& b0,
                                                  bool accumulate) {
  static_assert(A::kRows == 64 && B::kRows % (8 * N) == 0 && A::kBlocks == B::kBlocks);
  const Descriptor a0(a.base);
#pragma unroll
  for (int k = 0; k < A::kCols / 16; ++k) {
    const auto step = [&](int rows) { return k / 4 * rows * cuda::kSwizzleBytes + k % 4 * 32; };
    multiply_async(s.x[0], a0.at(step(A::kRows)), b0.at(step(B::kRows)), accumulate || k > 0, typename A::Element{});
  }
}
template <class A, class B, int N>
__device__ __forceinline__ void multiply_straight(Accumulator<1, N>& s, const A& a, const B& b, bool accumulate,
                                                  int b_row = 0) {
  multiply_straight<A, B>(s, a, Descriptor(b.address(b_row, 0)), accumulate);
}
// S = A B^T, started.
template <class A, class B, int N>
__device__ __forceinline__ void start_straight(Accumulator<1, N>& s, const A& a, const Descriptor& b0) {
  multiply_straight<A, B>(s, a, b0, false);
  commit_products();
}
template <class A, class B, int N>
__device__ __forceinline__ void start_straight(Accumulator<1, N>& s, const A& a, const B& b) {
  start_straight<A, B>(s, a, Descriptor(b.base));
}

// S = A B^T, and with kFolds the part of the statistics of B's rows (cuda/delta.h) that `selector` takes; started.
template <bool kFolds, class A, class B, int N>
__device__ __forceinline__ void start_folded(Accumulator<1, N>& s, uint32_t selector, const A& a, const B& b,
                                             uint32_t statistics) {
  if constexpr (kFolds)
    multiply_async(s.x[0], doubled_descriptor(selector, 0), doubled_descriptor(statistics, 8 * 16), false,
                   __nv_bfloat16{});
  multiply_straight(s, a, b, kFolds);
  commit_products();
}

// Zeros in the statistics of rows [begin, end), by one warp.
__device__ inline void clear_statistics(uint32_t statistics, int begin, int end) {
  for (int i = begin + lane_index(); i < end; i += cuda::kWarpThreads)
    sm80::store_shared_16_bytes(statistics + 16 * i, uint4{0, 0, 0, 0});
}

// Left factors that take -lse / scale, and 128 bytes on those that take -delta, from the statistics: 8 equal rows of
// (1, 1, 1, 0, 0, 0, 0, 0), and of (0, 0, 0, 1, 1, 1, 0, 0). By 64 threads.
constexpr int kSelectorsBytes = 2 * 128;
__device__ inline void init_selectors(uint32_t selectors, int thread) {
  const int pair = thread % 4 * 2, first = thread / 32 * 3;
  const auto one = [&](int i) { return i >= first && i < first + 3 ? 1.0f : 0.0f; };
  sm80::store_shared(selectors + 4 * thread, sm80::pack(one(pair), one(pair + 1), __nv_bfloat16{}));
  fence_async_proxy();
}

// O += P V, its steps only. P in registers, one fragment per 16 rows of V.
template <class V, int N, int kSteps>
__device__ __forceinline__ void multiply_transposed(Accumulator<1, N>& o, const uint32_t (&p)[kSteps][4], const V& v) {
  static_assert(V::kRows == 16 * kSteps && V::kCols == 8 * N);
  const Descriptor v0(v.base, V::kRows * cuda::kSwizzleBytes);
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    multiply_async(o.x[0], p[k], v0.at(k * 16 * cuda::kSwizzleBytes), true, typename V::Element{});
}
// The same with P in shared memory.
template <class P, class V, int N>
__device__ __forceinline__ void multiply_transposed(Accumulator<1, N>& o, const P& p, const V& v) {
  static_assert(P::kRows == 64 && P::kBlocks == 1 && V::kRows == P::kCols && V::kCols == 8 * N);
  const Descriptor p0(p.base), v0(v.base, V::kRows * cuda::kSwizzleBytes);
#pragma unroll
  for (int k = 0; k < V::kRows / 16; ++k)
    multiply_async<false, true>(o.x[0], p0.at(k * 32), v0.at(k * 16 * cuda::kSwizzleBytes), true,
                                typename V::Element{});
}
// O += P V, started.
template <class V, int N, int kSteps>
__device__ __forceinline__ void start_transposed(Accumulator<1, N>& o, const uint32_t (&p)[kSteps][4], const V& v) {
  multiply_transposed(o, p, v);
  commit_products();
}

// The same S by mma.sync, for the 16 rows of one warp, from row0 of A on: no other warp needs to take part.
template <class A, class B, int N>
__device__ __forceinline__ void multiply_warp(Accumulator<1, N>& s, const A& a, int row0, const B& b) {
  using T = typename A::Element;
  const int lane = opaque(lane_index()), row = lane % 16, chunk = lane / 16 * 16;
  const uint32_t a0 = a.address(row0 + row, 0) ^ chunk, b0 = b.address(row, 0) ^ chunk;
  s.fill(0);
#pragma unroll 1
  for (int k = 0; k < A::kCols / 16; ++k) {
    const auto step = [&](uint32_t first, int rows) {
      return (first ^ (k % 4 * 32)) + k / 4 * rows * cuda::kSwizzleBytes;
    };
    uint32_t left[4], right[4];
    sm80::load_matrices(step(a0, A::kRows), left);
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      sm80::load_matrices(step(b0, B::kRows) + pair * 16 * cuda::kSwizzleBytes, right);
      sm80::mma(s.x[0][2 * pair], left, {right[0], right[2]}, T{});
      sm80::mma(s.x[0][2 * pair + 1], left, {right[1], right[3]}, T{});
    }
  }
}

// Starts the copy of a tile, by one thread. The barrier has been told how many bytes to expect.
template <class Tile>
__device__ void load_tile(const Tile& tile, const TensorMap& map, int row, int head, int batch, uint32_t barrier) {
  for (int block = 0; block < Tile::kBlocks; ++block)
    load_box(tile.address(0, block * 64), map, block * 64, row, head, batch, barrier);
}

// Zeros in the rows [begin, end), by one warp.
template <class Tile>
__device__ void clear_rows(const Tile& tile, int begin, int end) {
  constexpr int kChunks = Tile::kBlocks * 8;
#pragma unroll 1
  for (int i = begin * kChunks + lane_index(); i < end * kChunks; i += cuda::kWarpThreads)
    sm80::store_shared_16_bytes(tile.address(i / kChunks, i % kChunks * 8), uint4{0, 0, 0, 0});
}

}  // namespace fae::sm90
