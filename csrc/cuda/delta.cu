#include "../core/schedule.h"
#include "../core/softmax.h"
#include "accumulator.h"
#include "delta.h"
#include "launch.h"
#include "pack.h"
#include "score_terms.h"

namespace fae::cuda {
namespace {

struct Preparation {
  BackwardProblem p;  // with delta of the workspace, and cu_seqlens as they were given
  BackwardSpace space;
  RowStatistics statistics;
  TaskOrder order;
};

constexpr int kThreads = 256;
constexpr int kRowLanes = 8;  // threads of one row: 128 contiguous bytes of 64 16-bit elements

template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Copies `count` starts, limited to [0, total] and to the largest before them. Returns the most from one to the next.
// One warp.
__device__ int32_t copy_monotone(const int32_t* from, int64_t count, int64_t total, int32_t* to) {
  int32_t largest = 0, longest = 0;
  for (int64_t i = lane_index(); i - lane_index() < count; i += kWarpThreads) {
    int32_t x = i < count ? static_cast<int32_t>(clamp_length(from[i], total)) : 0;
    x = max(x, largest);
#pragma unroll
    for (int offset = 1; offset < kWarpThreads; offset *= 2) {
      const int32_t before = __shfl_up_sync(0xffffffffu, x, offset);
      if (lane_index() >= offset) x = max(x, before);
    }
    if (i < count) to[i] = x;
    const int32_t last = __shfl_up_sync(0xffffffffu, x, 1);
    if (i > 0 && i < count) longest = max(longest, x - (lane_index() == 0 ? largest : last));
    largest = __shfl_sync(0xffffffffu, x, kWarpThreads - 1);
  }
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2)
    longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, offset));
  return longest;
}

// A division of 64 bits takes longer than a row.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return static_cast<uint64_t>(a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// A lane's part of a dot product.
template <class T>
__device__ __forceinline__ float dot(const T* x, const T* y, int64_t size) {
  constexpr int kChunk = kPackSize<T>;
  float sum = 0;
#pragma unroll 2
  for (int64_t d = threadIdx.x % kRowLanes * kChunk; d < size; d += kRowLanes * kChunk) {
    float a[kChunk], b[kChunk];
    load<kChunk>(x + d, a);
    load<kChunk>(y + d, b);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += a[i] * b[i];
  }
  return sum;
}

// x as a sum of three numbers of 8 bits each.
__device__ __forceinline__ void split(float x, __nv_bfloat16 (&parts)[3]) {
  constexpr float kLimit = 1e38f;  // infinities have no parts; NaN stays what it is
  x = x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i] = __float2bfloat16(x);
    x -= __bfloat162float(parts[i]);
  }
}

__device__ __forceinline__ uint4 fold(float lse, float delta, float scale) {
  __nv_bfloat16 of_lse[3], of_delta[3];
  split(lse == minus_infinity<float>() ? 0.0f : -0.5f * lse / scale, of_lse);  // a row without keys
  split(-0.5f * delta, of_delta);
  const __nv_bfloat16 zero = __float2bfloat16(0.0f);
  const __nv_bfloat16 all[8] = {of_lse[0], of_lse[1], of_lse[2], of_delta[0], of_delta[1], of_delta[2], zero, zero};
  uint4 bytes;
  memcpy(&bytes, all, 16);
  return bytes;
}

__device__ __forceinline__ uint4 as_floats(float lse, float delta) {
  return {__float_as_uint(lse == minus_infinity<float>() ? 0.0f : lse * kLog2e), __float_as_uint(delta), 0, 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ Preparation a) {
  const BackwardProblem& p = a.p;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < a.space.counter_count; i += threads) a.space.counters[i] = 0;
  const bool packed = p.cu_seqlens_q != nullptr;
  if (packed && blockIdx.x == 0 && warp_index() == 0) {
    const int32_t longest_q = copy_monotone(p.cu_seqlens_q, p.batch + 1, p.total_q, a.space.cu_seqlens_q);
    const int32_t longest_k = copy_monotone(p.cu_seqlens_k, p.batch + 1, p.total_k, a.space.cu_seqlens_k);
    if (a.order.block_keys > 0 && lane_index() == 0)
      *a.space.packed_tasks = a.order.schedule(p.batch, longest_q, longest_k, a.space.cu_seqlens_k, p.total_k);
  }

  // All rows of the tensors: of packed ones also those that no sequence has, whose delta nobody reads.
  const int64_t rows = packed ? p.total_q : p.max_seqlen_q, count = (packed ? 1 : p.batch) * rows * p.heads;
  const int64_t last = ceil_div(count, threads / kRowLanes) * (threads / kRowLanes);  // whole warps take part in sums
  for (int64_t i = thread / kRowLanes; i < last; i += threads / kRowLanes) {
    const int64_t number = quotient(i, p.heads), batch = quotient(number, rows);
    const int64_t head = i - number * p.heads, row = number - batch * rows;
    float sum = 0;
    if (i < count)
      sum = dot<T>(row_ptr<T>(p.out, batch, row, head), row_ptr<T>(p.dout, batch, row, head), p.head_dim_v);
    sum = sum_over_lanes<kRowLanes>(sum);
    if (i >= count || threadIdx.x % kRowLanes != 0) continue;
    const float lse = *stats_ptr<float>(p.lse, batch, row, head);
    // A row that sees nothing has no gradient, whatever comes through its lse: -inf in what follows easily makes NaN.
    if (p.dlse.data) sum = lse == minus_infinity<float>() ? 0.0f : sum - *stats_ptr<float>(p.dlse, batch, row, head);
    if (p.delta.data) *stats_ptr<float>(p.delta, batch, row, head) = sum;
    const RowStatistics& statistics = a.statistics;
    if (statistics.rows.data) {
      uint4* const group = row_ptr<uint4>(statistics.rows, batch, row >> statistics.group_bits, head);
      group[row & ((1 << statistics.group_bits) - 1)] =
          statistics.folded ? fold(lse, sum * statistics.delta_weight, static_cast<float>(p.softmax_scale))
                            : as_floats(lse, sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) dsinks_kernel(const __grid_constant__ BackwardProblem p) {
  __shared__ float warps[kThreads / kWarpThreads];
  const int64_t head = blockIdx.x;
  const float sink = static_cast<const float*>(p.sinks)[head];
  float sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t row = threadIdx.x; row < s.seqlen_q; row += kThreads) {
      const float lse = *stats_ptr<float>(p.lse, b, s.q_start + row, head);
      sum += exp_of(sink - finite_max(lse)) * *stats_ptr<float>(p.delta, b, s.q_start + row, head);
    }
  }
  sum = sum_over_lanes<kWarpThreads>(sum);
  if (lane_index() == 0) warps[warp_index()] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarpThreads; ++i) sum += warps[i];
  static_cast<float*>(p.dsinks)[head] = -sum;
}

}  // namespace

BackwardProblem prepare_backward(const BackwardProblem& problem, const BackwardSpace& space, RowStatistics statistics,
                                 const TaskOrder& order, const Execution& execution) {
  BackwardProblem p = problem;
  p.delta = space.delta;
  const Preparation preparation{p, space, statistics, order};
  const int64_t rows = (p.cu_seqlens_q ? p.total_q : p.batch * p.max_seqlen_q) * p.heads;
  const Grid grid{
      .blocks = std::max<int64_t>(1, ceil_div(rows, kThreads / kRowLanes)), .threads = kThreads, .loops = true};
  const auto run = [&](auto type) {
    launch("backward preparation", prepare_kernel<decltype(type)>, grid, execution.stream, preparation);
  };
  if (p.dtype == DType::float32)
    run(float{});
  else if (p.dtype == DType::bfloat16)
    run(__nv_bfloat16{});
  else
    run(__half{});

  if (p.cu_seqlens_q) {
    p.cu_seqlens_q = space.cu_seqlens_q;
    p.cu_seqlens_k = space.cu_seqlens_k;
  }
  return p;
}

void compute_dsinks(const BackwardProblem& p, const Execution& execution) {
  launch("dsinks", dsinks_kernel, Grid{.blocks = p.heads, .threads = kThreads}, execution.stream, p);
}

}  // namespace fae::cuda
