#pragma once

#include "../core/backend.h"
#include "../core/schedule.h"

// Copies of matrices over the scores in rows that begin at multiples of 16 bytes.

namespace fae::cuda {

// Where a copy's rows begin, one after the other from `place` on, and what they take.
inline int64_t aligned_cols(const ScoreView& m, int64_t element_size) {
  return round_up(m.size_col, 16 / element_size);
}
inline int64_t aligned_bytes(const ScoreView& m, int64_t element_size) {
  return element_size * m.size_batch * m.size_head * m.size_row * aligned_cols(m, element_size);
}
inline ScoreView aligned_matrix(const ScoreView& m, int64_t element_size, void* place) {
  ScoreView copy = m;
  copy.data = place;
  const int64_t cols = aligned_cols(m, element_size);
  const auto stride = [](int64_t size, int64_t elements) { return size == 1 ? 0 : elements; };
  copy.stride_row = stride(m.size_row, cols);
  copy.stride_head = stride(m.size_head, m.size_row * cols);
  copy.stride_batch = stride(m.size_batch, m.size_head * m.size_row * cols);
  return copy;
}

// Of elements of 1 or 2 bytes, which are neighbours in the rows of both.
void copy_matrix(const ScoreView& to, const ScoreView& from, int64_t element_size, const Execution& execution);

}  // namespace fae::cuda
