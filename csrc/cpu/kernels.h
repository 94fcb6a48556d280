#pragma once

#include "../core/rowwise.h"

// The kernels of the CPU backend. Every instruction-set level compiles the same files into a namespace of its own and
// offers them through this table.

namespace fae::cpu {

struct Kernels {
  size_t (*forward_workspace)(const Problem&, int threads);
  void (*forward)(const Problem&, const Execution&);
  size_t (*backward_workspace)(const BackwardProblem&, int threads);
  void (*backward)(const BackwardProblem&, const Execution&);
  size_t (*decode_workspace)(const Problem&, int threads);
  void (*decode)(const Problem&, const Execution&);
  RowwiseKernels rowwise;
};

// Attention in bfloat16 on packed tiles (tiles.h), forward and backward.
struct MatrixKernels {
  size_t (*forward_workspace)(const Problem&, int threads);
  void (*forward)(const Problem&, const Execution&);
  size_t (*backward_workspace)(const BackwardProblem&, int threads);
  void (*backward)(const BackwardProblem&, const Execution&);
};

#define FAE_DECLARE_KERNELS(level)                                                      \
  namespace level {                                                                     \
  size_t forward_workspace(const Problem&, int threads);                                \
  void forward(const Problem&, const Execution&);                                       \
  size_t backward_workspace(const BackwardProblem&, int threads);                       \
  void backward(const BackwardProblem&, const Execution&);                              \
  size_t decode_workspace(const Problem&, int threads);                                 \
  void decode(const Problem&, const Execution&);                                        \
  void softmax(const SoftmaxArgs&, const Execution&);                                   \
  void softmax_backward(const SoftmaxArgs&, const Execution&);                          \
  void merge(const MergeArgs&, const Execution&);                                       \
  void merge_backward(const MergeArgs&, const Execution&);                              \
  inline constexpr Kernels kernels{forward_workspace,                                   \
                                   forward,                                             \
                                   backward_workspace,                                  \
                                   backward,                                            \
                                   decode_workspace,                                    \
                                   decode,                                              \
                                   {softmax, softmax_backward, merge, merge_backward}}; \
  }
#define FAE_DECLARE_MATRIX_KERNELS(level)                                                                  \
  namespace level {                                                                                        \
  size_t forward_workspace(const Problem&, int threads);                                                   \
  void forward(const Problem&, const Execution&);                                                          \
  size_t backward_workspace(const BackwardProblem&, int threads);                                          \
  void backward(const BackwardProblem&, const Execution&);                                                 \
  inline constexpr MatrixKernels matrix_kernels{forward_workspace, forward, backward_workspace, backward}; \
  }

FAE_DECLARE_KERNELS(portable)
FAE_DECLARE_MATRIX_KERNELS(amx_emulated)
#if defined(__x86_64__)
FAE_DECLARE_KERNELS(avx2)
FAE_DECLARE_KERNELS(avx512)
FAE_DECLARE_MATRIX_KERNELS(avx512_bf16)
FAE_DECLARE_MATRIX_KERNELS(amx)
#endif

}  // namespace fae::cpu
