#pragma once

#include <string>
#include <vector>

#include "../core/macros.h"

// Which instruction sets this machine has, and which one the kernels use.

namespace fae::cpu {

enum class Level { portable, avx2, avx512, avx512_bf16, amx, amx_emulated };

FAE_API const char* name_of(Level);

// Levels in this build, and those of them that this machine can run, weakest first. avx512_bf16 and amx are kernels for
// bfloat16; all else runs those of avx512. amx_emulated is the AMX kernels on a software model of the tile unit: slow,
// for tests on machines without AMX, never chosen by itself.
FAE_API std::vector<Level> compiled_levels();
FAE_API std::vector<Level> available_levels();

// The level in use: the machine's best, capped by the environment variable FAE_CPU_LEVEL.
FAE_API Level level();

// Chooses a level by name from here on ("" returns to the default); throws std::invalid_argument, naming the available
// ones, for any other.
FAE_API void set_level(const std::string& name);

}  // namespace fae::cpu
