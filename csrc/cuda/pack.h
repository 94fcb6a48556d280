#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../core/problem.h"

// Storage types in memory, float (double for double) in registers, moved 16 bytes at a time.

namespace fae::cuda {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kPackSize = 16 / sizeof(T);

__device__ inline double to_compute(double x) { return x; }
__device__ inline float to_compute(float x) { return x; }
__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }

template <class T>
__device__ T to_storage(Compute<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// N neighbouring elements as one load or store; N = 1 for rows that are not 16-byte aligned.
template <class T, int N>
struct alignas(N * sizeof(T)) Packed {
  T x[N];
};

template <int N, class T>
__device__ void load(const T* p, Compute<T> (&values)[N]) {
  const Packed<T, N> packed = *reinterpret_cast<const Packed<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_compute(packed.x[i]);
}

template <int N, class T>
__device__ void store(const Compute<T> (&values)[N], T* p) {
  Packed<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.x[i] = to_storage<T>(values[i]);
  *reinterpret_cast<Packed<T, N>*>(p) = packed;
}

// Whether rows that start at `data` and every `strides` elements of `size` bytes can be read 16 bytes at a time.
template <class... Strides>
bool aligned(const void* data, [[maybe_unused]] int64_t size, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides * size % 16 == 0) && ...);
}

// Calls f with a value of the type behind a dtype.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
    case DType::float16:
      return f(__half{});
  }
}

}  // namespace fae::cuda
