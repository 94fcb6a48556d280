#pragma once

#include <cstdint>

#include "../cuda/device.h"

// Instructions of compute capability 9.0a that have no name in CUDA C++, beside those of sm80/ptx.h. The only file here
// with inline assembly; the emulator has the same functions in C++. Shared memory is named by byte offsets.

#if !defined(__CUDACC__)
#include "../emulator/ptx_sm90.h"
#else
#include <cuda.h>

namespace fae::sm90 {

using TensorMap = CUtensorMap;

// ---- mbarrier: a phase ends when `count` threads have arrived and the bytes that they expect have come --------------

__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Predicated: behind a branch, the compiler no longer knows that the warp is in step.
__device__ __forceinline__ void arrive_if(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}
// Of the phase that a later arrival ends, and that therefore cannot end before.
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive_expecting_if(uint32_t barrier, int bytes, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n"
      "}" ::"r"(barrier),
      "r"(bytes), "r"(static_cast<int>(condition))
      : "memory");
}
// Waits for the end of a phase of that parity.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended = 0;
#pragma unroll 1
  while (!ended)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// ---- Clusters: thread blocks that run side by side and reach each other's shared memory ----------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of the cluster that have not returned wait for each other.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies at `address` in the shared memory of another thread block, for the two functions below.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Relaxed: a release in a cluster is a fence of the whole GPU, for which warps wait longest of all. What this thread
// has read and used has been read.
__device__ __forceinline__ void arrive_in_block_if(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}
// 16 bytes, which the barrier, of the same thread block, counts when they have arrived.
__device__ __forceinline__ void store_async(uint32_t address, const uint32_t (&x)[4], uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(barrier)
      : "memory");
}

// ---- Boxes of a tensor [batch, head, row, col], moved by the tensor memory accelerator ------------------------------

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The barrier counts all bytes of the box: those outside of the tensor arrive as zeros.
__device__ __forceinline__ void load_box(uint32_t address, const TensorMap& map, int col, int row, int head, int batch,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(address),
      "l"(&map), "r"(col), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, int col, int row, int head, int batch,
                                          uint32_t address) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(col), "r"(row), "r"(head), "r"(batch), "r"(address)
               : "memory");
}
// Kernels launched with Grid::overlaps may begin when all thread blocks of the one before have let them, or have ended;
// all that it has written is there after a wait. Until then, its thread blocks that still run keep their
// multiprocessors.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the kLeft newest groups have read shared memory; have written global memory.
template <int kLeft>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
template <int kLeft>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Puts this thread's accesses to shared memory before those of the accelerator and of wgmma after the next barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Registers ------------------------------------------------------------------------------------------------------

// How many each thread of the warpgroup has from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ uint32_t load_shared_2_bytes(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_shared_byte(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

// Four 8x8 matrices of 16-bit elements, in the order in which load_matrices of sm80 reads them.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// The same matrices, each transposed on its way.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
// One 8x8 matrix, transposed from registers to registers.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// The same number, of which the compiler no longer knows where it comes from: what follows from it is worked out where
// it is needed, and not kept in a register through the loops before.
template <class Int>
__device__ __forceinline__ Int opaque(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Products of a warpgroup ----------------------------------------------------------------------------------------

// What registers and shared memory hold now is what the products that follow see.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// The compiler does not know that a product goes on after its instruction: this keeps it from moving other work on the
// registers of one to the wrong side of a wait.
template <int N>
__device__ __forceinline__ void fence_registers(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i])::"memory");
}
template <int N>
__device__ __forceinline__ void fence_registers(uint32_t (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i])::"memory");
}

// d (+)= a b for the 64 rows of a warpgroup, 16 columns of a, 8 N columns of d: a and b from shared memory, each stored
// by rows or (kTransposed*) by columns; or a from registers and b stored by columns. Operands may be overwritten and d
// read after a wait.
#define FAE_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FAE_NAMES_64 \
  FAE_NAMES_32       \
  ", "               \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FAE_NAMES_80 \
  FAE_NAMES_64       \
  ", "               \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FAE_NAMES_96 \
  FAE_NAMES_80       \
  ", "               \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define FAE_NAMES_128 \
  FAE_NAMES_96        \
  ", "                \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FAE_NAMES_192                                                                \
  FAE_NAMES_128                                                                      \
  ", "                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FAE_NAMES_256                                                                            \
  FAE_NAMES_192                                                                                  \
  ", "                                                                                           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FAE_REGISTERS_OF_8_COLUMNS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FAE_REGISTERS_OF_16_COLUMNS(n) FAE_REGISTERS_OF_8_COLUMNS(n), FAE_REGISTERS_OF_8_COLUMNS(n + 1)
#define FAE_REGISTERS_OF_32_COLUMNS(n) FAE_REGISTERS_OF_16_COLUMNS(n), FAE_REGISTERS_OF_16_COLUMNS(n + 2)
#define FAE_REGISTERS_OF_64_COLUMNS(n) FAE_REGISTERS_OF_32_COLUMNS(n), FAE_REGISTERS_OF_32_COLUMNS(n + 4)
#define FAE_REGISTERS_32 FAE_REGISTERS_OF_32_COLUMNS(0)
#define FAE_REGISTERS_64 FAE_REGISTERS_OF_64_COLUMNS(0)
#define FAE_REGISTERS_80 FAE_REGISTERS_64, FAE_REGISTERS_OF_16_COLUMNS(8)
#define FAE_REGISTERS_96 FAE_REGISTERS_64, FAE_REGISTERS_OF_32_COLUMNS(8)
#define FAE_REGISTERS_128 FAE_REGISTERS_64, FAE_REGISTERS_OF_64_COLUMNS(8)
#define FAE_REGISTERS_192 FAE_REGISTERS_128, FAE_REGISTERS_OF_64_COLUMNS(16)
#define FAE_REGISTERS_256 FAE_REGISTERS_192, FAE_REGISTERS_OF_64_COLUMNS(24)

// i0 to i5: numbers of the operands after the registers of d.
#define FAE_PRODUCT(Type, PTX, COLUMNS, i0, i1, i2, i3, i4, i5)                                                       \
  template <bool kTransposedA = false, bool kTransposedB = false>                                                     \
  __device__ __forceinline__ void multiply_async(float (&d)[COLUMNS / 8][4], uint64_t a, uint64_t b, bool accumulate, \
                                                 Type) {                                                              \
    asm volatile(                                                                                                     \
        "{\n"                                                                                                         \
        ".reg .pred p;\n"                                                                                             \
        "setp.ne.b32 p, %" #i2                                                                                        \
        ", 0;\n"                                                                                                      \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." PTX "." PTX " {" FAE_NAMES_##COLUMNS                  \
        "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4                                                             \
        ";\n"                                                                                                         \
        "}"                                                                                                           \
        : FAE_REGISTERS_##COLUMNS                                                                                     \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposedA)),                     \
          "n"(static_cast<int>(kTransposedB)));                                                                       \
  }                                                                                                                   \
  __device__ __forceinline__ void multiply_async(float (&d)[COLUMNS / 8][4], const uint32_t (&a)[4], uint64_t b,      \
                                                 bool accumulate, Type) {                                             \
    asm volatile(                                                                                                     \
        "{\n"                                                                                                         \
        ".reg .pred p;\n"                                                                                             \
        "setp.ne.b32 p, %" #i5                                                                                        \
        ", 0;\n"                                                                                                      \
        "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." PTX "." PTX " {" FAE_NAMES_##COLUMNS                  \
        "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4                                                          \
        ", p, 1, 1, 1;\n"                                                                                             \
        "}"                                                                                                           \
        : FAE_REGISTERS_##COLUMNS                                                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));                     \
  }
#define FAE_PRODUCTS(...)                         \
  FAE_PRODUCT(__nv_bfloat16, "bf16", __VA_ARGS__) \
  FAE_PRODUCT(__half, "f16", __VA_ARGS__)

FAE_PRODUCTS(32, 16, 17, 18, 19, 20, 21)
FAE_PRODUCTS(64, 32, 33, 34, 35, 36, 37)
FAE_PRODUCTS(80, 40, 41, 42, 43, 44, 45)
FAE_PRODUCTS(96, 48, 49, 50, 51, 52, 53)
FAE_PRODUCTS(128, 64, 65, 66, 67, 68, 69)
FAE_PRODUCTS(192, 96, 97, 98, 99, 100, 101)
FAE_PRODUCTS(256, 128, 129, 130, 131, 132, 133)

}  // namespace fae::sm90

#endif
