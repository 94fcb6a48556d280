#pragma once

#include "ptx.h"

// Rings of buffers in shared memory between those who fill them and those who empty them.

namespace fae::sm90 {

// One thread's place in a ring of kStages buffers, each of which has a barrier that says when it is full and one that
// says when it is empty. Everybody goes through all buffers in order.
template <int kStages>
class Ring {
 public:
  static constexpr int kBytes = 2 * kStages * 8;  // of barriers

  __device__ __forceinline__ explicit Ring(uint32_t barriers) : barriers_(barriers) {}

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
  int stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace fae::sm90
