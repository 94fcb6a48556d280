#pragma once

#include "../core/backend.h"
#include "kernels.h"

namespace fae::cpu {

// The CPU's entry of the dispatch list, and the kernels of the level in use for the ops that are not attention.
const Backend& backend();
const Kernels& kernels();

}  // namespace fae::cpu
