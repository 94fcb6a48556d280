#include "../ops/dispatch.h"
#include "../ops/ops.h"
#include "../sm80/backend.h"
#include "../sm90/backend.h"
#include "rowwise.h"

// Loading this library makes the ops run on CUDA tensors.

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  using namespace fae;
#if defined(FAE_SM90)
  ops::register_backend(sm90::backend());
#endif
  ops::register_backend(sm80::backend());
  ops::register_cuda_rowwise({cuda::softmax, cuda::softmax_backward, cuda::merge, cuda::merge_backward});
  ops::register_ops(m);
}
