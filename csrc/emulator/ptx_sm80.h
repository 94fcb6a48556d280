#pragma once

#include <bit>

#include "device.h"

// The functions of sm80/ptx.h on the software model.

namespace fae::sm80 {

using emulator::LaneOperands;

inline char* dynamic_shared_memory() { return emulator::shared_memory(); }
inline uint32_t shared_offset(const void* p) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(p) - emulator::shared_memory());
  return emulator::in_block(offset, emulator::cluster_rank());
}

using Words = uint32_t[4];

inline void load_matrices(uint32_t address, Words& x) {
  emulator::warp_operation(
      "ldmatrix",
      [](const LaneOperands(&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix)
          for (int lane = 0; lane < 32; ++lane) {
            const uint32_t row = *static_cast<const uint32_t*>(lanes[8 * matrix + lane / 4].in);
            std::memcpy(&(*static_cast<Words*>(lanes[lane].out))[matrix],
                        emulator::shared_bytes(row, 16) + lane % 4 * 4, 4);
          }
      },
      &address, &x);
}

inline void load_matrices_transposed(uint32_t address, Words& x) {
  emulator::warp_operation(
      "ldmatrix.trans",
      [](const LaneOperands(&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix)
          for (int lane = 0; lane < 32; ++lane) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const uint32_t row = *static_cast<const uint32_t*>(lanes[8 * matrix + lane % 4 * 2 + e].in);
              std::memcpy(&pair[e], emulator::shared_bytes(row, 16) + lane / 4 * 2, 2);
            }
            std::memcpy(&(*static_cast<Words*>(lanes[lane].out))[matrix], pair, 4);
          }
      },
      &address, &x);
}

inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, emulator::shared_bytes(address, 4), 4);
  return x;
}
inline void store_shared(uint32_t address, uint32_t x) { std::memcpy(emulator::shared_bytes(address, 4), &x, 4); }
inline uint4 load_shared_16_bytes(uint32_t address) {
  uint4 x;
  std::memcpy(&x, emulator::shared_bytes(address, 16), 16);
  return x;
}
inline void store_shared_16_bytes(uint32_t address, const uint4& x) {
  std::memcpy(emulator::shared_bytes(address, 16), &x, 16);
}

inline void copy_16_bytes(uint32_t address, const void* global, bool valid) {
  emulator::copy_later(address, global, 16, valid ? 16 : 0);
}
inline void copy_4_bytes(uint32_t address, const void* global, bool valid) {
  emulator::copy_later(address, global, 4, valid ? 4 : 0);
}
inline void commit_copies() { emulator::close_copy_group(); }
template <int kLeft>
void wait_copies() {
  emulator::wait_for_copies(kLeft);
}

inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }
// The unit looks at the bits of tf32 only.
inline float to_float(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0x1fffu); }

template <class T>
struct MmaOperands {
  float (*d)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

// Element e of 4 / sizeof(T) in a register.
template <class T>
float element(uint32_t word, int e) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&word) + e * sizeof(T), sizeof(T));
  return to_float(x);
}

// In products.cpp, which is compiled for speed.
template <class T>
void multiply_fragments(const LaneOperands (&lanes)[32]);

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  const MmaOperands<T> operands{&d, &a, &b};
  emulator::warp_operation("mma", multiply_fragments<T>, &operands, nullptr);
}

inline void add_to_global(float* p, const float (&x)[4]) {
  for (int i = 0; i < 4; ++i) p[i] += x[i];
}
inline int load_acquire(const int* p) { return emulator::poll(p); }
inline int load_relaxed(const int* p) { return emulator::poll(p); }
inline void store_release(int* p, int x) { *p = x; }

}  // namespace fae::sm80
