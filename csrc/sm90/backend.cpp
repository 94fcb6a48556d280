#include "backend.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../cuda/matrix_copy.h"
#include "../cuda/other_rows.h"
#include "../sm80/kernels.h"
#include "kernels.h"
#include "readable.h"

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

std::vector<std::string> declines(const Problem& p) {
  std::vector<std::string> reasons;
  if (!on_hopper()) reasons.push_back("it needs a GPU of compute capability 9.x");
  if (p.dtype != DType::bfloat16 && p.dtype != DType::float16) reasons.push_back("it takes bfloat16 and float16");
  if (std::max(p.head_dim, p.head_dim_v) > 256) reasons.push_back("it takes head dims up to 256");
  if (p.batch * p.heads * (p.max_seqlen_q / 64 + 1) >= int64_t{1} << 30)
    reasons.push_back("it takes fewer than 2^30 blocks of 64 query rows");
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k;
  if (rows_k == 0) reasons.push_back("it takes one key or more");
  const int64_t batch_q = p.cu_seqlens_q ? 1 : p.batch, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  if (!readable(p.q, rows_q, p.heads, batch_q) || !readable(p.k, rows_k, p.heads_kv, batch_k) ||
      !readable(p.v, rows_k, p.heads_kv, batch_k))
    reasons.push_back("it takes tensors whose rows, heads and batches lie apart, by less than 2^39 elements");
  return reasons;
}

std::vector<std::string> declines_backward(const BackwardProblem& p) {
  std::vector<std::string> reasons = declines(p);
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q, batch_q = p.cu_seqlens_q ? 1 : p.batch;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  if (p.heads * (batch_k * (rows_k / 64 + 1) + p.batch) >= int64_t{1} << 30)  // which are numbered
    reasons.push_back("its backward takes fewer than 2^30 blocks of 64 keys");
  if (p.heads * (batch_q * (rows_q / 16 + 1) + p.batch) >= int64_t{1} << 31)  // so are these
    reasons.push_back("its backward takes fewer than 2^31 groups of 16 query rows");
  if (!readable(p.dout, rows_q, p.heads, batch_q) || !readable(p.dq, rows_q, p.heads, batch_q) ||
      !readable(p.dk, rows_k, p.heads_kv, batch_k) || !readable(p.dv, rows_k, p.heads_kv, batch_k))
    reasons.push_back(
        "its backward takes gradients whose rows, heads and batches lie apart, by less than 2^39 elements");
  return reasons;
}

std::string describe(const Problem& p, bool backward) {
  const auto tile = with_head_dim(p, [](auto dim) { return std::to_string(dim()); });
  return std::string(backward ? "backward" : "forward") + " on wgmma, head dim tile " + tile;
}

// A call of which kernels made for a bias or a mask can read that, and write the gradient: where it lies otherwise,
// with copies in the first `bytes` of the workspace.
template <class P>
struct WithCopies {
  P p;
  int64_t bytes = 0;

  WithCopies(const P& call, void* workspace) : p(call), workspace_(static_cast<char*>(workspace)) {
    const bool other_terms = p.alibi_slopes || p.softcap != 0 || p.dropout_p > 0;
    if (other_terms || (p.bias.data && p.mask.data)) return;
    if (std::max(p.head_dim, p.head_dim_v) > 128 && !has_shared_gradient(p)) return;
    if (p.mask.data) place(p.mask, kMaskBytes);
    if (!p.bias.data || p.bias.dtype != p.dtype) return;
    place(p.bias, kBiasBytes);
    if constexpr (std::is_same_v<P, BackwardProblem>)
      if (p.dbias.data) place(p.dbias, kBiasBytes);
  }
  void copy_inputs(const P& call, const Execution& execution) const {
    copy(p.mask, call.mask, kMaskBytes, execution);
    copy(p.bias, call.bias, kBiasBytes, execution);
  }
  static void copy_gradient(const BackwardProblem& to, const BackwardProblem& from, const Execution& execution) {
    copy(to.dbias, from.dbias, kBiasBytes, execution);
  }
  Execution rest(Execution execution) const {
    execution.workspace = workspace_ + bytes;
    return execution;
  }

 private:
  static constexpr int64_t kMaskBytes = 1, kBiasBytes = 2;  // of an element

  // Of a bias: the kernel for that is made for it at every head dim.
  static bool has_shared_gradient(const Problem&) { return false; }
  static bool has_shared_gradient(const BackwardProblem& p) { return p.dbias.data && sm80::broadcasts(p, p.dbias); }

  void place(ScoreView& m, int64_t element_size) {
    if (m.stride_col != 1 || readable(m, element_size)) return;
    m = cuda::aligned_matrix(m, element_size, workspace_ + bytes);
    bytes += round_up(cuda::aligned_bytes(m, element_size), 256);
  }
  static void copy(const ScoreView& to, const ScoreView& from, int64_t element_size, const Execution& execution) {
    if (to.data != from.data) cuda::copy_matrix(to, from, element_size, execution);
  }

  char* const workspace_;
};
void* const kAnyWorkspace = reinterpret_cast<void*>(256);  // to find out what is needed

size_t forward_workspace(const Problem& p, int) {
  return static_cast<size_t>(WithCopies(p, kAnyWorkspace).bytes) + sizeof(int);  // the counter of tiles
}

void forward(const Problem& p, const Execution& execution) {
  cuda::clear_other_rows(p, execution);
  const WithCopies with(p, execution.workspace);
  with.copy_inputs(p, execution);
  with_kernels(p, [&](auto type, auto dim) { sm90::forward<type(), dim()>(with.p, with.rest(execution)); });
}

size_t backward_workspace(const BackwardProblem& p, int) {
  const WithCopies with(p, kAnyWorkspace);
  return static_cast<size_t>(with.bytes) +
         with_kernels(p, [&](auto type, auto dim) { return sm90::backward_workspace<type(), dim()>(with.p); });
}

void backward(const BackwardProblem& p, const Execution& execution) {
  const WithCopies with(p, execution.workspace);
  with.copy_inputs(p, execution);
  if (p.hides_scores()) with.copy_gradient(with.p, p, execution);  // zeros
  with_kernels(p, [&](auto type, auto dim) { sm90::backward<type(), dim()>(with.p, with.rest(execution)); });
  with.copy_gradient(p, with.p, execution);
  cuda::clear_other_gradients(p, execution);  // behind the kernels, which use the place of dq (backward_space.h)
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
                            .takes_whole_vectors = true,
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
