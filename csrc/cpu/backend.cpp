#include "backend.h"

#include "level.h"

namespace fae::cpu {
namespace {

// Up to this many rows per KV head a call streams K and V once and packs nothing (decode.cpp).
constexpr int64_t kDecodeRows = 8;

bool is_decode(const Problem& p) {
  return p.dtype != DType::float64 && p.batch * p.heads > 0 && p.heads_kv > 0 &&
         p.max_seqlen_q * (p.heads / p.heads_kv) <= kDecodeRows;
}

const MatrixKernels* matrix_kernels(const Problem& p) {
  if (p.dtype != DType::bfloat16) return nullptr;
  if (level() == Level::amx_emulated) return &amx_emulated::matrix_kernels;
#if defined(__x86_64__)
  if (level() == Level::avx512_bf16) return &avx512_bf16::matrix_kernels;
  if (level() == Level::amx) return &amx::matrix_kernels;
#endif
  return nullptr;
}

std::vector<std::string> declines(const Problem&) { return {}; }
std::vector<std::string> declines_backward(const BackwardProblem&) { return {}; }

std::string describe(const Problem& p, bool backward) {
  const std::string name = backward ? "backward" : "forward";
  if (!backward && is_decode(p)) return "decode, " + std::string(name_of(level()));
  return name + (matrix_kernels(p) ? " on matrix tiles, " : ", ") + name_of(level());
}

size_t forward_workspace(const Problem& p, int threads) {
  if (is_decode(p)) return kernels().decode_workspace(p, threads);
  const MatrixKernels* matrix = matrix_kernels(p);
  return matrix ? matrix->forward_workspace(p, threads) : kernels().forward_workspace(p, threads);
}

void forward(const Problem& p, const Execution& e) {
  if (is_decode(p)) return kernels().decode(p, e);
  const MatrixKernels* matrix = matrix_kernels(p);
  matrix ? matrix->forward(p, e) : kernels().forward(p, e);
}

size_t backward_workspace(const BackwardProblem& p, int threads) {
  const MatrixKernels* matrix = matrix_kernels(p);
  return matrix ? matrix->backward_workspace(p, threads) : kernels().backward_workspace(p, threads);
}

void backward(const BackwardProblem& p, const Execution& e) {
  const MatrixKernels* matrix = matrix_kernels(p);
  matrix ? matrix->backward(p, e) : kernels().backward(p, e);
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  if (level() == Level::avx2) return avx2::kernels;
  if (level() == Level::avx512 || level() == Level::avx512_bf16 || level() == Level::amx) return avx512::kernels;
#endif
  return portable::kernels;
}

const Backend& backend() {
  static const Backend cpu{.name = "cpu",
                           .declines = declines,
                           .declines_backward = declines_backward,
                           .describe = describe,
                           .forward_workspace = forward_workspace,
                           .forward = forward,
                           .backward_workspace = backward_workspace,
                           .backward = backward};
  return cpu;
}

}  // namespace fae::cpu
