#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../core/backend.h"
#include "tensors.h"

namespace fae::ops {

// Where the kernels of one call run: torch's threads, or the current stream of the tensor's device, which is the
// current device as long as this object lives. Scratch memory comes from torch's allocator.
class Runner {
 public:
  explicit Runner(const Tensor& on);

  int threads() const { return execution_.threads; }
  const Execution& execution(size_t workspace_bytes = 0);

 private:
  Tensor on_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  MaybeTensor workspace_;
  Execution execution_;
};

}  // namespace fae::ops
