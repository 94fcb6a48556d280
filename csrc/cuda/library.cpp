#include "../ops/dispatch.h"
#include "../ops/ops.h"
#include "../sm80/backend.h"
#include "rowwise.h"

// Loading this library makes the ops run on CUDA tensors.

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  using namespace fae;
  ops::register_backend(sm80::backend());
  ops::register_cuda_rowwise({cuda::softmax, cuda::softmax_backward, cuda::merge, cuda::merge_backward});
  ops::register_ops(m);
}
