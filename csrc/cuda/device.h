#pragma once

// CUDA C++ as the kernels use it. Without nvcc it is a software model of it (emulator/), on which tests run the same
// kernel sources on machines that have no GPU.

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../emulator/device.h"
#endif

namespace fae::cuda {

constexpr int kWarpThreads = 32;

// Shared memory of a thread block on the largest device that the code is being compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostSharedMemory = 163 << 10;
#else
constexpr int kMostSharedMemory = 227 << 10;
#endif

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpThreads; }

}  // namespace fae::cuda
