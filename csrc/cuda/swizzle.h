#pragma once

#include <cstdint>

#include "device.h"

// Matrices in shared memory: blocks of 128 bytes of every row, one block after the other, each [rows][128 bytes]. The
// eight 16-byte chunks of a row are permuted by the row's number, so that the same chunk of eight neighbouring rows,
// and eight chunks of one row, lie in different banks. This is also the 128-byte swizzle of the tensor memory
// accelerator.

namespace fae::cuda {

constexpr int kSwizzleBytes = 128;

__host__ __device__ constexpr uint32_t swizzled_offset(int rows, int row, int byte) {
  return static_cast<uint32_t>((byte / kSwizzleBytes * rows + row) * kSwizzleBytes + ((byte / 16 ^ row) & 7) * 16 +
                               byte % 16);
}

// Matrix of kRows x kCols elements of T at a byte offset of shared memory, a multiple of 1024.
template <class T, int kRows_, int kCols_>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kBlocks = (kCols * static_cast<int>(sizeof(T)) + kSwizzleBytes - 1) / kSwizzleBytes;
  static constexpr int kBytes = kBlocks * kRows * kSwizzleBytes;
  static_assert(kRows % 8 == 0);

  uint32_t base;

  __device__ __forceinline__ uint32_t address(int row, int col) const {
    return base + swizzled_offset(kRows, row, col * static_cast<int>(sizeof(T)));
  }
};

}  // namespace fae::cuda
