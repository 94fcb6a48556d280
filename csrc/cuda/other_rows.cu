#include "../core/band.h"
#include "../core/schedule.h"
#include "../core/softmax.h"
#include "launch.h"
#include "other_rows.h"

namespace fae::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads, kBlocksPerMultiprocessor = 8;

// Tensors with the same rows, of queries or of keys.
struct Rows {
  int64_t batch = 0, rows = 0, heads = 0;  // batch 0: nothing to do
  const int32_t* cu_seqlens = nullptr;
  bool keys = false;
  bool unseeing = false;  // rows that see no key become zero, too
  TensorView tensors[2];
  int64_t row_bytes[2] = {};  // of a head
  StatsView lse;
};

struct Clearing {
  Problem p;
  int64_t element_size;
  Rows sides[2];
};

// The last sequence that begins at or before `row` of a packed tensor, or -1.
__device__ int64_t sequence_at(const int32_t* cu_seqlens, int64_t batch, int64_t row) {
  int64_t b = -1;
  for (int64_t above = batch; above - b > 1;) {
    const int64_t middle = (b + above) / 2;
    (cu_seqlens[middle] <= row ? b : above) = middle;
  }
  return b;
}

__device__ bool has_result(const Problem& p, const Rows& side, int64_t batch, int64_t row) {
  if (side.cu_seqlens) batch = sequence_at(side.cu_seqlens, p.batch, row);
  if (batch < 0) return false;
  const Sequence s = sequence_of(p, batch);
  row -= side.keys ? s.k_start : s.q_start;
  if (row >= (side.keys ? s.seqlen_k : s.seqlen_q)) return false;
  return !side.unseeing || !band_of(p, s).any(row, row + 1).empty();
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads) clear_kernel(const __grid_constant__ Clearing a) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index();
  for (const Rows& side : a.sides)
    for (int64_t i = warp; i < side.batch * side.rows; i += static_cast<int64_t>(gridDim.x) * kWarps) {
      const int64_t batch = i / side.rows, row = i - batch * side.rows;
      if (has_result(a.p, side, batch, row)) continue;
      for (int t = 0; t < 2; ++t)
        for (int64_t head = 0; head < side.heads; ++head) {
          const TensorView& x = side.tensors[t];
          const int64_t element = batch * x.stride_batch + row * x.stride_row + head * x.stride_head;
          auto* const to = reinterpret_cast<uint4*>(static_cast<char*>(x.data) + element * a.element_size);
          for (int64_t u = lane_index(); u * kVectorBytes < side.row_bytes[t]; u += kWarpThreads) to[u] = uint4{};
        }
      if (side.lse.data)
        for (int64_t head = lane_index(); head < side.heads; head += kWarpThreads)
          *stats_ptr<float>(side.lse, batch, row, head) = minus_infinity<float>();
    }
}

Rows rows_of(const Problem& p, bool keys, int64_t heads) {
  const int32_t* const cu_seqlens = keys ? p.cu_seqlens_k : p.cu_seqlens_q;
  const int64_t total = keys ? p.total_k : p.total_q, longest = keys ? p.max_seqlen_k : p.max_seqlen_q;
  Rows side;
  side.batch = cu_seqlens ? 1 : p.batch;
  side.rows = cu_seqlens ? total : longest;
  side.heads = heads;
  side.cu_seqlens = cu_seqlens;
  side.keys = keys;
  return side;
}

void clear(const Problem& p, const Rows& queries, const Rows& keys, const Execution& execution) {
  const Clearing clearing{p, element_size(p.dtype), {queries, keys}};
  const int64_t rows = std::max(queries.batch * queries.rows, keys.batch * keys.rows);
  const Grid grid{
      .blocks = std::min<int64_t>(ceil_div(rows, kWarps), int64_t{kBlocksPerMultiprocessor} * multiprocessors()),
      .threads = kThreads,
      .loops = true};
  launch("other rows", clear_kernel, grid, execution.stream, clearing);
}

}  // namespace

void clear_other_rows(const Problem& p, const Execution& execution) {
  if (!p.cu_seqlens_q && !p.seqused_q) return;
  Rows side = rows_of(p, false, p.heads);
  side.tensors[0] = p.out;
  side.row_bytes[0] = p.head_dim_v * element_size(p.dtype);
  side.lse = p.lse;
  clear(p, side, {}, execution);
}

void clear_other_gradients(const BackwardProblem& p, const Execution& execution) {
  Rows queries, keys;
  // Where lengths are the tensors' own, the host knows whether any row sees no key.
  const Band band = band_of(p, Sequence{0, 0, p.max_seqlen_q, p.max_seqlen_k});
  const bool all_see = band.rows_any(0, band.seqlen_k).size() == band.seqlen_q;
  if (p.cu_seqlens_q || p.seqused_q || p.seqused_k || !all_see) {
    queries = rows_of(p, false, p.heads);
    queries.unseeing = true;
    queries.tensors[0] = p.dq;
    queries.row_bytes[0] = p.head_dim * element_size(p.dtype);
  }
  if (p.cu_seqlens_k || p.seqused_k) {
    keys = rows_of(p, true, p.heads_kv);
    keys.tensors[0] = p.dk;
    keys.row_bytes[0] = p.head_dim * element_size(p.dtype);
    keys.tensors[1] = p.dv;
    keys.row_bytes[1] = p.head_dim_v * element_size(p.dtype);
  }
  clear(p, queries, keys, execution);
}

}  // namespace fae::cuda
