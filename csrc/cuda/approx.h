#pragma once

#include "device.h"

// exp2 and 1/x of the special function units, to 22 bits; what is subnormal counts as 0. CUDA C++ has names for them
// with a few instructions more each, which make up for that.

namespace fae::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A product of which nothing becomes part of a fused multiply-add.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#else
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float rounded_product(float a, float b) { return a * b; }
#endif

}  // namespace fae::cuda
