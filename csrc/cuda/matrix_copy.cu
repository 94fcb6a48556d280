#include "launch.h"
#include "matrix_copy.h"

namespace fae::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads, kBlocksPerMultiprocessor = 8;

struct MatrixCopy {
  ScoreView to, from;
  int64_t rows;  // of all heads
};

// A warp for each row.
template <class E>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ MatrixCopy a) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(); i < a.rows; i += warps) {
    const int64_t all_heads = i / a.from.size_row, row = i - all_heads * a.from.size_row;
    const int64_t batch = all_heads / a.from.size_head, head = all_heads - batch * a.from.size_head;
    const auto begin = [&](const ScoreView& m) {
      return static_cast<E*>(m.data) + batch * m.stride_batch + head * m.stride_head + row * m.stride_row;
    };
    const E* const from = begin(a.from);
    E* const to = begin(a.to);
#pragma unroll 4
    for (int64_t col = lane_index(); col < a.from.size_col; col += kWarpThreads) to[col] = from[col];
  }
}

}  // namespace

void copy_matrix(const ScoreView& to, const ScoreView& from, int64_t element_size, const Execution& execution) {
  const int64_t rows = from.size_batch * from.size_head * from.size_row;
  const Grid grid{
      .blocks = std::min<int64_t>(ceil_div(rows, kWarps), int64_t{kBlocksPerMultiprocessor} * multiprocessors()),
      .threads = kThreads,
      .loops = true};
  launch("matrix copy", element_size == 1 ? copy_kernel<uint8_t> : copy_kernel<uint16_t>, grid, execution.stream,
         {to, from, rows});
}

}  // namespace fae::cuda
