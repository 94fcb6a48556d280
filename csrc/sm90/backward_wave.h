#pragma once

#include "pipeline.h"

// Key blocks that go round (core/schedule.h, Round) wait for higher tickets of their wave, which may not be drawn as
// long as they wait: fewer thread blocks may run than a wave has members, beside other work or on a part of a card.
//
// So each member but the last asks, before it goes on with the last query block, whether the wave is whole: whether the
// highest of its tickets, which follow each other, has been drawn. Then all are with thread blocks of their own, since
// nobody draws a ticket before its last step is on its way, and none waits for a ticket above those of the wave.
//
// Otherwise it waits, and at last gives the wave up. Members then go on without visits to dQ. When the last one's turn
// comes, it makes up for these visits after its own, member after member, by computing their steps again. So every sum
// has the same order, and the same bits, however many thread blocks run. But half of the wave's work is done twice, the
// second time by one of them: that takes long where there are many, and it is worth to wait as long.

namespace fae::sm90 {

// What is known of a wave, in global memory. All lanes of the loading warp call, and take the same way: where they did
// not, the compiler would keep what they share in registers of each, of which the warp has few.
class Wave {
 public:
  __device__ explicit Wave(int* state) : state_(state) {}

  // Whether it is open still, after a short time.
  __device__ bool is_open() const {
    if (uniform(sm80::load_relaxed(state_)) != kOpen) return false;
    __nanosleep(kNapNanoseconds);
    return true;
  }
  // Whether it is whole. If not, it is given up now, if it has not been before.
  __device__ bool is_whole_or_given_up() const { return exchange(kGivenUp) == kWhole; }
  // The last member is there. Whether that makes it whole, or comes too late.
  __device__ bool make_whole() const { return exchange(kWhole) == kOpen; }
  // Of a wave that was given up, a member has loaded all that it needs; all but the last have. Rows that are written
  // after their last visit may until then hold statistics.
  __device__ void leave() const {
    __threadfence();
    if (cuda::lane_index() == 0) atomicAdd(state_, 1);
  }
  __device__ void wait_for_others(int members) const {
#pragma unroll 1
    while (uniform(sm80::load_acquire(state_)) != kGivenUp + members - 1) __nanosleep(kNapNanoseconds);
  }

 private:
  static constexpr int kWhole = -1, kOpen = 0, kGivenUp = 1;  // kGivenUp and above: that, and how many have left
  static constexpr unsigned kNapNanoseconds = 500;

  // Instead of kOpen. Returns what it was.
  __device__ int exchange(int state) const {
    return uniform(cuda::lane_index() == 0 ? atomicCAS(state_, kOpen, state) : 0);
  }

  int* state_;
};

}  // namespace fae::sm90
