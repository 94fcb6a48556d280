#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fae::cuda {

// Launches `kernel` on a grid of one dimension and throws where that fails, naming the kernel and the shape. A grid has
// at most 2^31 - 1 blocks; kernels loop over their rows with the grid's stride, so that any number of rows works.
template <class... Args>
void launch(const char* name, void (*kernel)(Args...), int64_t blocks, int threads, void* stream,
            std::type_identity_t<Args>... args) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX));
  config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else reports it again
  throw std::runtime_error(std::string("flash_attn_ext: CUDA kernel ") + name + " did not launch with " +
                           std::to_string(config.gridDim.x) + " blocks of " + std::to_string(threads) +
                           " threads: " + cudaGetErrorString(error));
}

}  // namespace fae::cuda
