#pragma once

#include <cstdint>

#include "../core/problem.h"

// Which tensors the tensor memory accelerator can read.

namespace fae::sm90 {

// 16-byte aligned rows, in a place of their own each.
inline bool readable(const TensorView& t, int64_t rows, int64_t heads, int64_t batch, int64_t element_size = 2) {
  constexpr int64_t kMaxStride = int64_t{1} << 39;  // elements
  const auto fits = [&](int64_t extent, int64_t stride) {
    return extent == 1 || (stride > 0 && stride < kMaxStride && stride * element_size % 16 == 0);
  };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(rows, t.stride_row) && fits(heads, t.stride_head) &&
         fits(batch, t.stride_batch);
}

// The same of a matrix over the scores, which has size 1 where it is the same everywhere.
inline TensorView tensor_of(const ScoreView& m) { return {m.data, m.stride_batch, m.stride_row, m.stride_head}; }
inline bool readable(const ScoreView& m, int64_t element_size) {
  return m.stride_col == 1 && readable(tensor_of(m), m.size_row, m.size_head, m.size_batch, element_size);
}

}  // namespace fae::sm90
