#pragma once

#include "../core/backend.h"
#include "../core/schedule.h"

// Copies of matrices over the scores, of 16-bit elements, in rows that begin at multiples of 16 bytes.

namespace fae::cuda {

// Where a copy's rows begin, one after the other from `place` on, and what they take.
inline int64_t aligned_cols(const ScoreView& m) { return round_up(m.size_col, 8); }
inline int64_t aligned_bytes(const ScoreView& m) {
  return 2 * m.size_batch * m.size_head * m.size_row * aligned_cols(m);
}
inline ScoreView aligned_matrix(const ScoreView& m, void* place) {
  ScoreView copy = m;
  copy.data = place;
  const auto stride = [](int64_t size, int64_t elements) { return size == 1 ? 0 : elements; };
  copy.stride_row = stride(m.size_row, aligned_cols(m));
  copy.stride_head = stride(m.size_head, m.size_row * aligned_cols(m));
  copy.stride_batch = stride(m.size_batch, m.size_head * m.size_row * aligned_cols(m));
  return copy;
}

// Columns are neighbours in both.
void copy_matrix(const ScoreView& to, const ScoreView& from, const Execution& execution);

}  // namespace fae::cuda
