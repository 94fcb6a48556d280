#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ptx.h"
#include "readable.h"

// Descriptions of tensors for the tensor memory accelerator.

namespace fae::sm90 {

constexpr int kBoxCols = 64;  // 128 bytes of 16-bit elements: one line of the swizzle

// [batch, head, row, col], of which a copy moves box_rows rows of box_cols columns. A dimension of size 1 may have any
// stride, which the accelerator need not understand.
struct TensorExtents {
  int64_t cols, rows, heads, batch;
};
// How rows of a box lie in shared memory: those of 128 or 64 bytes with the swizzle of as many; or as they are.
enum class BoxLayout { swizzled, plain };

#if defined(__CUDACC__)

// The driver's encoder, found at run time: the library loads where there is no driver.
inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode)
    throw std::runtime_error("flash_attn_ext: the CUDA driver has no cuTensorMapEncodeTiled (needs CUDA 12)");
  return encode;
}

inline CUtensorMapDataType element_type(DType dtype, int element_size) {
  if (element_size == 1) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

inline TensorMap make_tensor_map(DType dtype, const TensorView& view, const TensorExtents& extents, int box_rows,
                                 int box_cols = kBoxCols, int element_size = 2,
                                 BoxLayout layout = BoxLayout::swizzled) {
  const auto bytes = [&](int64_t extent, int64_t stride) {
    return static_cast<cuuint64_t>(extent == 1 ? 16 : element_size * stride);
  };
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(extents.cols), static_cast<cuuint64_t>(extents.rows),
                             static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t strides[] = {bytes(extents.rows, view.stride_row), bytes(extents.heads, view.stride_head),
                                bytes(extents.batch, view.stride_batch)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const int swizzle_bytes = layout == BoxLayout::swizzled ? box_cols * element_size : 0;
  TensorMap map;
  const CUresult result = tensor_map_encoder()(&map, element_type(dtype, element_size), 4, view.data, dims, strides,
                                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                               swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                               : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                     : CU_TENSOR_MAP_SWIZZLE_NONE,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("flash_attn_ext: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  return map;
}

#else

inline TensorMap make_tensor_map(DType, const TensorView& view, const TensorExtents& extents, int box_rows,
                                 int box_cols = kBoxCols, int element_size = 2,
                                 BoxLayout layout = BoxLayout::swizzled) {
  return {
      static_cast<char*>(view.data),
      {extents.cols, extents.rows, extents.heads, extents.batch},
      {element_size, element_size * view.stride_row, element_size * view.stride_head, element_size * view.stride_batch},
      element_size,
      box_cols,
      box_rows,
      layout == BoxLayout::swizzled};
}

#endif

// Tile: what a copy moves, or (OverlayTile, 16 bits) as many boxes side by side as that has.
template <class Tile>
TensorMap make_tensor_map(DType dtype, const ScoreView& m) {
  constexpr int kSize = static_cast<int>(sizeof(typename Tile::Element));
  return make_tensor_map(dtype, tensor_of(m), {m.size_col, m.size_row, m.size_head, m.size_batch}, Tile::kRows,
                         Tile::kCols / Tile::kBlocks, kSize);
}

}  // namespace fae::sm90
