#pragma once

#include "device.h"

// The functions of sm90/ptx.h on the software model.

namespace fae::sm90 {

using TensorMap = emulator::TensorMap;

inline void init_barrier(uint32_t barrier, int count) { emulator::init_barrier(barrier, count); }
inline void fence_barrier_init() {}
inline void arrive(uint32_t barrier) { emulator::arrive_at_barrier(barrier, 0); }
inline void arrive_if(uint32_t barrier, bool condition) {
  if (condition) emulator::arrive_at_barrier(barrier, 0);
}
inline void expect(uint32_t barrier, int bytes) { emulator::expect_at_barrier(barrier, bytes); }
inline void arrive_expecting(uint32_t barrier, int bytes) { emulator::arrive_at_barrier(barrier, bytes); }
inline void arrive_expecting_if(uint32_t barrier, int bytes, bool condition) {
  if (condition) emulator::arrive_at_barrier(barrier, bytes);
}
inline void wait(uint32_t barrier, uint32_t parity) { emulator::wait_for_barrier(barrier, static_cast<int>(parity)); }

inline int cluster_rank() { return emulator::cluster_rank(); }
inline void sync_cluster() { emulator::cluster_barrier(); }
inline uint32_t in_block(uint32_t address, int rank) { return emulator::in_block(address, rank); }
inline void arrive_in_block_if(uint32_t barrier, bool condition) {
  if (condition) emulator::arrive_in_block(barrier);
}
inline void store_async(uint32_t address, const uint32_t (&x)[4], uint32_t barrier) {
  emulator::store_later(address, x, barrier);
}

inline void prefetch(const TensorMap&) {}
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void load_box(uint32_t address, const TensorMap& map, int col, int row, int head, int batch, uint32_t barrier) {
  emulator::load_box_later({map, {col, row, head, batch}, address}, barrier);
}
inline void store_box(const TensorMap& map, int col, int row, int head, int batch, uint32_t address) {
  emulator::store_box_later({map, {col, row, head, batch}, address});
}
inline void commit_stores() { emulator::close_store_group(); }
template <int kLeft>
void wait_stores_read() {
  emulator::wait_for_stores(kLeft);
}
template <int kLeft>
void wait_stores() {
  emulator::wait_for_stores(kLeft);
}
inline void fence_async_proxy() {}

template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}
template <class Int>
Int opaque(Int x) {
  return x;
}

// Four 8x8 matrices of 16-bit elements from where a warp has them in registers: element `col` of row `row` goes to
// element `col` of the row that lane 8 * matrix + row names, or the other way round.
template <bool kTransposed>
void store_matrices_as(const char* name, uint32_t address, const uint32_t (&x)[4]) {
  struct In {
    uint32_t address;
    const uint32_t* x;
  } const in{address, x};
  emulator::warp_operation(
      name,
      [](const emulator::LaneOperands(&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix)
          for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 2; ++e) {
              const int row = lane / 4, col = lane % 4 * 2 + e, line = kTransposed ? col : row;
              const uint32_t to = static_cast<const In*>(lanes[8 * matrix + line].in)->address;
              std::memcpy(emulator::shared_bytes(to, 16) + 2 * (kTransposed ? row : col),
                          reinterpret_cast<const char*>(&static_cast<const In*>(lanes[lane].in)->x[matrix]) + 2 * e, 2);
            }
      },
      &in, nullptr);
}
inline uint32_t load_shared_2_bytes(uint32_t address) {
  uint16_t x;
  std::memcpy(&x, emulator::shared_bytes(address, 2), 2);
  return x;
}
inline uint32_t load_shared_byte(uint32_t address) {
  return static_cast<unsigned char>(*emulator::shared_bytes(address, 1));
}
inline void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  store_matrices_as<false>("stmatrix", address, x);
}
inline void store_matrices_transposed(uint32_t address, const uint32_t (&x)[4]) {
  store_matrices_as<true>("stmatrix.trans", address, x);
}
inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  emulator::warp_operation(
      "movmatrix",
      [](const emulator::LaneOperands(&lanes)[32]) {
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < 2; ++e) {
            const int row = lane % 4 * 2 + e, col = lane / 4;  // of the matrix as it comes
            std::memcpy(static_cast<char*>(lanes[lane].out) + 2 * e,
                        static_cast<const char*>(lanes[row * 4 + col / 2].in) + col % 2 * 2, 2);
          }
      },
      &x, &y);
  return y;
}

// ---- wgmma: each warp does its 16 rows of the product when it waits for it ------------------------------------------

// What the hardware reads of a descriptor.
struct DecodedDescriptor {
  uint32_t start, leading, stride;
  bool swizzled;

  explicit DecodedDescriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4),
        swizzled(d >> 62 == 1) {
    if (d >> 62 > 1 || (d >> 49 & 7) != 0)
      emulator::fail("a descriptor that is neither for 1024-byte aligned 128-byte swizzle nor for none");
  }
  // Element k of row r of an operand that is stored by rows ("K-major"), and of one that is stored by columns.
  template <class T>
  T straight(int r, int k) const {
    if (swizzled) return at<T>(start + r / 8 * stride + r % 8 * 128 + k * 2);
    return at<T>(start + r / 8 * stride + k / 8 * leading + r % 8 * 16 + k % 8 * 2);  // 8x8 matrices of 128 bytes
  }
  template <class T>
  T transposed(int r, int k) const {
    if (!swizzled) emulator::fail("an operand stored by columns without swizzle: not modelled");
    return at<T>(start + r / 64 * leading + k / 8 * stride + k % 8 * 128 + r % 64 * 2);
  }

 private:
  template <class T>
  T at(uint32_t plain) const {
    T x;
    std::memcpy(&x, emulator::shared_bytes(swizzled ? plain ^ (plain >> 7 & 7) << 4 : plain, 2), 2);
    return x;
  }
};

inline void begin_products() {}
inline void commit_products() {
  emulator::warp_operation(
      "wgmma.commit_group", [](const auto&) { emulator::close_deferred_group(); }, nullptr, nullptr);
}
template <int kLeft>
void wait_products() {
  emulator::warp_operation(
      "wgmma.wait_group", [](const auto&) { emulator::wait_for_deferred(kLeft); }, nullptr, nullptr);
}
template <class X>
void fence_registers(X&) {}

inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float as_float(__half x) { return __half2float(x); }

// One k16 step of a warp: `a` names elements of its 16 rows, `b` of N columns.
template <int N, class A, class B>
void multiply_step(float* const (&d)[32], bool accumulate, const A& a, const B& b) {
  float left[16][16], right[16][8 * N];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) left[i][k] = as_float(a(i, k));
  for (int j = 0; j < 8 * N; ++j)
    for (int k = 0; k < 16; ++k) right[k][j] = as_float(b(j, k));
  float sum[16][8 * N] = {};
  emulator::add_product(16, 8 * N, 16, left[0], right[0], sum[0]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8 * N; ++j) {
      float& x = d[i % 8 * 4 + j % 8 / 2][4 * (j / 8) + i / 8 * 2 + j % 2];
      x = accumulate ? x + sum[i][j] : sum[i][j];
    }
}

template <int N>
struct ProductOperands {
  float* d;
  const uint32_t* a_registers;  // null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

template <class T, bool kTransposedA, bool kTransposedB, int N>
void start_product(const ProductOperands<N>& operands) {
  emulator::warp_operation(
      "wgmma",
      [](const emulator::LaneOperands(&lanes)[32]) {
        struct Step {
          float* d[32];
          const uint32_t* a[32];
          ProductOperands<N> first;
          int row;
        } step;
        for (int i = 0; i < 32; ++i) {
          const auto& lane = *static_cast<const ProductOperands<N>*>(lanes[i].in);
          step.d[i] = lane.d;
          step.a[i] = lane.a_registers;
          step.first = lane;
        }
        step.row = static_cast<int>(emulator::thread_index().x) / 32 % 4 * 16;
        emulator::defer([step] {
          const DecodedDescriptor b(step.first.b_descriptor);
          if (step.first.a_registers) {
            const auto a = [&](int i, int k) {
              T x;
              const uint32_t* words = step.a[i % 8 * 4 + k % 8 / 2];
              std::memcpy(&x, reinterpret_cast<const char*>(&words[i / 8 + k / 8 * 2]) + k % 2 * 2, 2);
              return x;
            };
            multiply_step<N>(step.d, step.first.accumulate, a, [&](int j, int k) { return b.transposed<T>(j, k); });
          } else {
            const DecodedDescriptor a(step.first.a_descriptor);
            multiply_step<N>(
                step.d, step.first.accumulate,
                [&](int i, int k) {
                  return kTransposedA ? a.transposed<T>(step.row + i, k) : a.straight<T>(step.row + i, k);
                },
                [&](int j, int k) { return kTransposedB ? b.transposed<T>(j, k) : b.straight<T>(j, k); });
          }
        });
      },
      &operands, nullptr);
}

template <bool kTransposedA = false, bool kTransposedB = false, class T, int N>
void multiply_async(float (&d)[N][4], uint64_t a, uint64_t b, bool accumulate, T) {
  start_product<T, kTransposedA, kTransposedB, N>({&d[0][0], nullptr, a, b, accumulate});
}
template <class T, int N>
void multiply_async(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, T) {
  start_product<T, false, true, N>({&d[0][0], a, 0, b, accumulate});
}

}  // namespace fae::sm90
