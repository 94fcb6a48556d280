#include "backend.h"

#include <algorithm>
#include <cstdint>

#include "../cuda/other_rows.h"
#include "kernels.h"

#if !defined(FAE_EMULATOR)
#include <cuda_runtime_api.h>
#endif

namespace fae::sm90 {
namespace {

// Calls run with the smallest head dim tile that holds a call's head dims, as a constant.
template <class F>
auto with_head_dim(const Problem& p, F&& run) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 64) return run(std::integral_constant<int, 64>{});
  if (dim <= 128) return run(std::integral_constant<int, 128>{});
  if (dim <= 192) return run(std::integral_constant<int, 192>{});
  return run(std::integral_constant<int, 256>{});
}

// The same with the call's type before it.
template <class F>
auto with_kernels(const Problem& p, F&& run) {
  return with_head_dim(p, [&](auto dim) {
    if (p.dtype == DType::bfloat16) return run(std::integral_constant<DType, DType::bfloat16>{}, dim);
    return run(std::integral_constant<DType, DType::float16>{}, dim);
  });
}

#if defined(FAE_EMULATOR)
bool on_hopper() { return true; }
#else
// Of the current device, which is that of the tensors.
bool on_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}
#endif

// Whether the tensor memory accelerator can read a tensor: 16-byte aligned rows, in a place of their own each.
bool readable(const TensorView& t, int64_t rows, int64_t heads, int64_t batch) {
  constexpr int64_t kMaxStride = int64_t{1} << 39;  // elements
  const auto fits = [](int64_t extent, int64_t stride) {
    return extent == 1 || (stride > 0 && stride < kMaxStride && stride % 8 == 0);
  };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(rows, t.stride_row) && fits(heads, t.stride_head) &&
         fits(batch, t.stride_batch);
}

std::vector<std::string> declines(const Problem& p) {
  std::vector<std::string> reasons;
  if (!on_hopper()) reasons.push_back("it needs a GPU of compute capability 9.x");
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) reasons.push_back("it takes bfloat16 and float16");
  if (std::max(p.head_dim, p.head_dim_v) > 256) reasons.push_back("it takes head dims up to 256");
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0) reasons.push_back("it takes head dims that are multiples of 8");
  if (p.batch * p.heads * (p.max_seqlen_q / 64 + 1) >= int64_t{1} << 30)
    reasons.push_back("it takes fewer than 2^30 blocks of 64 query rows");
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k;
  if (rows_k == 0) reasons.push_back("it takes one key or more");
  const int64_t batch_q = p.cu_seqlens_q ? 1 : p.batch, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  if (!readable(p.q, rows_q, p.heads, batch_q) || !readable(p.k, rows_k, p.heads_kv, batch_k) ||
      !readable(p.v, rows_k, p.heads_kv, batch_k))
    reasons.push_back(
        "it takes tensors that begin, and have rows, heads and batches that begin, at multiples of 16 bytes");
  return reasons;
}

std::vector<std::string> declines_backward(const BackwardProblem& p) {
  std::vector<std::string> reasons = declines(p);
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q, batch_q = p.cu_seqlens_q ? 1 : p.batch;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  if (!readable(p.dout, rows_q, p.heads, batch_q) || !readable(p.dq, rows_q, p.heads, batch_q) ||
      !readable(p.dk, rows_k, p.heads_kv, batch_k) || !readable(p.dv, rows_k, p.heads_kv, batch_k))
    reasons.push_back("its backward takes gradients that begin, as all their rows, at multiples of 16 bytes");
  return reasons;
}

std::string describe(const Problem& p, bool backward) {
  const auto tile = with_head_dim(p, [](auto dim) { return std::to_string(dim()); });
  return std::string(backward ? "backward" : "forward") + " on wgmma, head dim tile " + tile;
}

size_t forward_workspace(const Problem&, int) { return sizeof(int); }  // the counter of tiles

void forward(const Problem& p, const Execution& execution) {
  cuda::clear_other_rows(p, execution);
  with_kernels(p, [&](auto type, auto dim) { sm90::forward<type(), dim()>(p, execution); });
}

size_t backward_workspace(const BackwardProblem& p, int) {
  return with_kernels(p, [&](auto type, auto dim) { return sm90::backward_workspace<type(), dim()>(p); });
}

void backward(const BackwardProblem& p, const Execution& execution) {
  cuda::clear_other_gradients(p, execution);
  with_kernels(p, [&](auto type, auto dim) { sm90::backward<type(), dim()>(p, execution); });
}

}  // namespace

const Backend& backend() {
#if defined(FAE_EMULATOR)
  constexpr const char* kName = "sm90_emulated";
  constexpr bool kCuda = false;
#else
  constexpr const char* kName = "sm90";
  constexpr bool kCuda = true;
#endif
  static const Backend sm90{.name = kName,
                            .cuda = kCuda,
                            .writes_all_rows = true,
                            .declines = declines,
                            .declines_backward = declines_backward,
                            .describe = describe,
                            .forward_workspace = forward_workspace,
                            .forward = forward,
                            .backward_workspace = backward_workspace,
                            .backward = backward};
  return sm90;
}

}  // namespace fae::sm90
