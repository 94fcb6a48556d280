#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "block.h"

// The part of CUDA C++ that kernels use, for the emulator: included instead of the CUDA runtime (cuda/device.h).

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one at a time, where they belong to no cluster and don't wait for each other

#define threadIdx (::fae::emulator::thread_index())
#define blockIdx (::fae::emulator::block_index())
#define gridDim (::fae::emulator::grid_size())

inline void __syncthreads() { fae::emulator::block_barrier(); }

inline void __syncwarp() {
  fae::emulator::warp_operation("__syncwarp", [](const auto&) {}, nullptr, nullptr);
}

// Every lane gets the value of the lane that `source` names for it.
template <class T, class Source>
T shuffle(const char* name, T value, int parameter, Source) {
  struct In {
    T value;
    int parameter;
  } in{value, parameter};
  T out;
  fae::emulator::warp_operation(
      name,
      [](const fae::emulator::LaneOperands(&lanes)[32]) {
        for (int i = 0; i < 32; ++i) {
          const int other = Source{}(i, static_cast<const In*>(lanes[i].in)->parameter);
          *static_cast<T*>(lanes[i].out) = static_cast<const In*>(lanes[other].in)->value;
        }
      },
      &in, &out);
  return out;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shuffle("__shfl_sync", value, lane, [](int, int parameter) { return parameter; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle("__shfl_xor_sync", value, mask, [](int i, int parameter) { return i ^ parameter; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return shuffle("__shfl_up_sync", value, by, [](int i, int parameter) { return i < parameter ? i : i - parameter; });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned out;
  fae::emulator::warp_operation(
      "__ballot_sync",
      [](const fae::emulator::LaneOperands(&lanes)[32]) {
        unsigned ballot = 0;
        for (int i = 0; i < 32; ++i) ballot |= unsigned{*static_cast<const int*>(lanes[i].in) != 0} << i;
        for (const auto& lane : lanes) *static_cast<unsigned*>(lane.out) = ballot;
      },
      &predicate, &out);
  return out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return !__any_sync(mask, !predicate); }
inline int __popc(unsigned x) { return std::popcount(x); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline int atomicCAS(int* address, int expected, int value) {
  const int before = *address;
  if (before == expected) *address = value;
  return before;
}
inline void __nanosleep(unsigned) { fae::emulator::sleep(); }

template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline void __threadfence() {}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7;
    result |= ((byte < 4 ? x : y) >> (byte % 4 * 8) & 0xff) << (8 * i);
  }
  return result;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
