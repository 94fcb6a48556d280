#include "level.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fae::cpu {
namespace {

#if defined(__x86_64__)
// AMX needs the kernel's permission for its 8 KB of tile state, asked for once per process.
bool amx_permitted() {
#if defined(__linux__)
  constexpr int kArchRequestXcompPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchRequestXcompPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Cpuid {
  unsigned eax, ebx, ecx, edx;
};

Cpuid cpuid(unsigned leaf, unsigned subleaf) {
  Cpuid id;
  __asm__("cpuid" : "=a"(id.eax), "=b"(id.ebx), "=c"(id.ecx), "=d"(id.edx) : "a"(leaf), "c"(subleaf));
  return id;
}

// What __builtin_cpu_supports does not know in every compiler.
bool has_f16c() { return cpuid(1, 0).ecx >> 29 & 1; }
bool has_amx_bf16() {
  const Cpuid id = cpuid(7, 0);
  return (id.edx >> 22 & 1) && (id.edx >> 24 & 1);  // AMX-BF16, AMX-TILE
}
bool has_avx512_bf16() { return cpuid(7, 0).eax >= 1 && (cpuid(7, 1).eax >> 5 & 1); }  // eax: the last subleaf
#endif

std::vector<Level> detect() {
  std::vector<Level> levels{Level::portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) levels.push_back(Level::avx2);
  if (avx512) levels.push_back(Level::avx512);
  const bool avx512_bf16 = avx512 && has_avx512_bf16(), amx = avx512_bf16 && has_amx_bf16() && amx_permitted();
  // Processors with AMX run vdpbf16ps at half the rate of FMA: where AMX itself is not permitted, avx512 is faster.
  if (avx512_bf16 && (amx || !has_amx_bf16())) levels.push_back(Level::avx512_bf16);
  if (amx) levels.push_back(Level::amx);
#endif
  levels.push_back(Level::amx_emulated);
  return levels;
}

const std::vector<Level>& detected() {
  static const std::vector<Level> levels = detect();
  return levels;
}

// `what`: who named it.
Level parse(const std::string& name, const std::string& what) {
  std::string accepted;
  for (Level candidate : detected()) {
    if (name == name_of(candidate)) return candidate;
    accepted += std::string(accepted.empty() ? "" : ", ") + name_of(candidate);
  }
  throw std::invalid_argument(what + " must be one of " + accepted + " on this machine, got '" + name + "'");
}

// A cap above what the machine has leaves the machine's best.
Level default_level() {
  const Level best = detected()[detected().size() - 2];
  const char* cap = std::getenv("FAE_CPU_LEVEL");
  if (!cap || !*cap) return best;
  for (Level known : {Level::portable, Level::avx2, Level::avx512, Level::avx512_bf16, Level::amx})
    if (std::string(cap) == name_of(known)) return known < best ? known : best;
  return parse(cap, "FAE_CPU_LEVEL");
}

std::atomic<int> chosen{-1};

}  // namespace

const char* name_of(Level level) {
  switch (level) {
    case Level::portable:
      return "portable";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::avx512_bf16:
      return "avx512_bf16";
    case Level::amx:
      return "amx";
    case Level::amx_emulated:
      return "amx_emulated";
  }
  return "unknown";
}

std::vector<Level> compiled_levels() {
#if defined(__x86_64__)
  return {Level::portable, Level::avx2, Level::avx512, Level::avx512_bf16, Level::amx, Level::amx_emulated};
#else
  return {Level::portable, Level::amx_emulated};
#endif
}

std::vector<Level> available_levels() { return detected(); }

Level level() {
  const int current = chosen.load(std::memory_order_relaxed);
  if (current >= 0) return static_cast<Level>(current);
  static const Level initial = default_level();
  return initial;
}

void set_level(const std::string& name) { chosen = name.empty() ? -1 : static_cast<int>(parse(name, "CPU level")); }

}  // namespace fae::cpu
