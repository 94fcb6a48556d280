#pragma once

#include "../sm80/ptx.h"
#include "ptx.h"

// Rings of buffers in shared memory between those who fill them and those who empty them.

namespace fae::sm90 {

// One thread's place in a ring of kStages buffers, each of which has a barrier that says when it is full and one that
// says when it is empty. Everybody goes through all buffers in order.
template <int kStages_>
class Ring {
 public:
  static constexpr int kStages = kStages_;
  static constexpr int kBytes = 2 * kStages * 8;  // of barriers

  // At buffer `number` of all that go through.
  __device__ __forceinline__ explicit Ring(uint32_t barriers, unsigned number = 0)
      : barriers_(barriers), stage_(static_cast<int>(number % kStages)), parity_(number / kStages % 2) {}

  // How many arrivals fill a buffer, and empty it. By one thread, before all others begin.
  __device__ void init(int fillers, int emptiers) const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(barriers_ + 8 * i, fillers);
      init_barrier(barriers_ + 8 * (kStages + i), emptiers);
    }
  }

  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t full() const { return barriers_ + 8 * stage_; }
  __device__ __forceinline__ uint32_t empty() const { return barriers_ + 8 * (kStages + stage_); }
  __device__ __forceinline__ void wait_full() const { wait(full(), parity_); }
  // Buffers start out empty: the phase before the first one has ended.
  __device__ __forceinline__ void wait_empty() const { wait(empty(), parity_ ^ 1); }

  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }

 private:
  uint32_t barriers_;
  int stage_;
  uint32_t parity_;
};

// The same for users that count what has gone through: number n is in buffer n % kStages for the n / kStages-th time.
template <int kStages>
struct NumberedBuffers {
  static constexpr int kCount = kStages;
  static __device__ __forceinline__ int stage(unsigned number) { return static_cast<int>(number % kStages); }
  static __device__ __forceinline__ uint32_t parity(unsigned number) { return number / kStages % 2; }
};

// A whole warp arrives: all of its lanes are done with what the barrier guards.
__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  arrive_if(barrier, cuda::lane_index() == 0);
}

// The same number in all lanes, as it is; told to the compiler, which then keeps it in a register of the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// A struct of ints by way of shared memory, from one thread to others, whole warps unless it says otherwise.
template <class X>
__device__ __forceinline__ void write_struct(uint32_t address, const X& x) {
  static_assert(sizeof(X) % 16 == 0);
  uint4 words[sizeof(X) / 16];
  memcpy(words, &x, sizeof(X));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(X)) / 16; ++i) sm80::store_shared_16_bytes(address + 16 * i, words[i]);
}
template <class X, class Read>
__device__ __forceinline__ X read_struct_with(uint32_t address, Read&& read) {
  uint4 words[sizeof(X) / 16];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(X)) / 16; ++i) {
    const uint4 x = sm80::load_shared_16_bytes(address + 16 * i);
    words[i] = {read(x.x), read(x.y), read(x.z), read(x.w)};
  }
  X x;
  memcpy(static_cast<void*>(&x), words, sizeof(X));
  return x;
}
template <class X>
__device__ __forceinline__ X read_struct(uint32_t address) {
  return read_struct_with<X>(address, [](uint32_t x) { return static_cast<uint32_t>(uniform(static_cast<int>(x))); });
}
template <class X>
__device__ __forceinline__ X read_struct_alone(uint32_t address) {  // by one thread
  return read_struct_with<X>(address, [](uint32_t x) { return x; });
}

}  // namespace fae::sm90
