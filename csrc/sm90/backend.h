#pragma once

#include "../core/backend.h"

namespace fae::sm90 {

// Kernels on wgmma and the tensor memory accelerator, for Hopper GPUs (compute capability 9.0) only.
const Backend& backend();

}  // namespace fae::sm90
