#pragma once

#include "../core/backend.h"

namespace fae::sm80 {

// Kernels on mma.sync for every GPU from compute capability 8.0 on.
const Backend& backend();

}  // namespace fae::sm80
