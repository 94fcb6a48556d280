#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"

namespace fae::cuda {

// Thread blocks, in one dimension, and what each of them has.
struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;  // dynamic
  bool loops = false;       // blocks stride over the work: fewer of them do, where there are more than a grid can have
  bool overlaps = false;    // may begin while the kernel before ends, for which it then waits (Hopper; sm90/ptx.h)
  bool waits = false;       // blocks wait for others; the emulator has some of them side by side
  int cluster = 1;          // blocks that run side by side (Hopper; sm90/ptx.h)
};

#if defined(__CUDACC__)

// What a thread block of the current device can have.
inline size_t shared_memory_per_block() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    throw std::runtime_error("flash_attn_ext: the CUDA device does not say how much shared memory it has");
  return static_cast<size_t>(bytes);
}

// Launches `kernel` and throws where that fails, naming the kernel and the shape.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), const Grid& grid, void* stream,
            std::type_identity_t<Args>... args) {
  if (grid.blocks == 0) return;
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > 48 * 1024)  // more than kernels get unasked
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(std::min<int64_t>(grid.blocks, grid.loops ? INT32_MAX : UINT32_MAX));
  config.blockDim.x = static_cast<unsigned>(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (grid.overlaps) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else reports it again
  throw std::runtime_error(std::string("flash_attn_ext: CUDA kernel ") + name + " did not launch with " +
                           std::to_string(config.gridDim.x) + " blocks of " + std::to_string(grid.threads) +
                           " threads and " + std::to_string(grid.shared_bytes) +
                           " bytes of shared memory: " + cudaGetErrorString(error));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline void clear(void* p, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("flash_attn_ext: memory was not cleared: ") + cudaGetErrorString(error));
}

#else

// What the emulator stands for follows from environment variables (emulator/block.h).
inline int64_t emulator_number(const char* variable, int64_t otherwise) {
  const char* const number = std::getenv(variable);
  return number ? std::atoll(number) : otherwise;
}
inline size_t shared_memory_per_block() {
  return static_cast<size_t>(emulator_number("FAE_EMULATOR_SHARED", 227 << 10));
}
inline int multiprocessors() {  // few enough for blocks that stay to have several tiles each
  return static_cast<int>(emulator_number("FAE_EMULATOR_MULTIPROCESSORS", 3));
}

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), const Grid& grid, void*, std::type_identity_t<Args>... args) {
  if (grid.blocks == 0) return;
  const int64_t together = grid.waits ? emulator_number("FAE_EMULATOR_FREE", multiprocessors()) : grid.cluster;
  emulator::run_grid(name, grid.blocks, grid.threads, grid.shared_bytes, together, [&] { kernel(args...); });
}

inline void clear(void* p, size_t bytes, void*) { std::memset(p, 0, bytes); }

#endif

}  // namespace fae::cuda
