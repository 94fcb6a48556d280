#pragma once

// FAE_INLINE marks every function of core/: callable on host and device, and always inlined, because the CPU
// kernels compile this folder once per instruction set and an out-of-line copy built for AVX-512 must never be the
// one that the linker keeps for a machine without it.
#if defined(__CUDACC__)
#define FAE_INLINE __host__ __device__ __forceinline__
#else
#define FAE_INLINE inline __attribute__((always_inline))
#endif

// What one of our libraries takes from another; everything else stays hidden.
#define FAE_API __attribute__((visibility("default")))
