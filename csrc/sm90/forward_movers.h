#pragma once

#include "forward_memory.h"
#include "tensor_map.h"

// The warps of the forward that move tiles between global and shared memory.

namespace fae::sm90 {

// Takes tiles and loads their Q, K and V.
template <class T, class Config>
class Loader {
  using Memory = ForwardMemory<T, Config>;

 public:
  __device__ Loader(const ForwardCall& call, const Memory& memory)
      : call_(call),
        p_(call.p),
        memory_(memory),
        q_(memory.ring_q()),
        k_(memory.ring_k()),
        v_(memory.ring_v()),
        first_(lane_index() == 0) {}

  __device__ void run() {
    const int tiles = static_cast<int>(call_.schedule.size()), blocks = static_cast<int>(gridDim.x);
    int next = 0;
#pragma unroll 1
    for (int index = static_cast<int>(blockIdx.x); index < tiles; index = next) {
      const int taken = call_.counter && first_ ? atomicAdd(call_.counter, 1) : 0;
      load(call_.schedule[index]);
      next = call_.counter ? blocks + uniform(taken) : index + blocks;
    }
    load_waiting_v();
    publish({.batch = -1}, false);
  }

 private:
  __device__ void load(const Tile& tile) {
    const Sequence s = sequence_of(p_, tile.batch);
    if (tile.block < 0 || tile.block * Config::kRows >= s.seqlen_q) return;
    const int batch = static_cast<int>(tile.batch), head = static_cast<int>(tile.head);
    const cuda::DeviceBand band(s.seqlen_q, s.seqlen_k, p_.window_left, p_.window_right);
    const Work work = {batch, head, static_cast<int>(tile.block) * Config::kRows, static_cast<int>(s.q_start), band};
    const KeyBlocks<int> blocks = key_blocks(band, work.row_begin, Config::kRows, Config::kKeys);
    const Keys keys = {p_.cu_seqlens_k ? 0 : batch, head / static_cast<int>(p_.heads / p_.heads_kv),
                       static_cast<int>(s.k_start), band.seqlen_k};
    if (blocks.begin >= blocks.end) {
      load_waiting_v();  // a place for Q may become free with the tile that waits for it only
      publish(work, false);
    }
    // From the last block to the first, V behind K: in the order in which they are used.
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
      load_k(keys, block);
      // Where there is one place for Q, it becomes free with the tile that waits for its last V.
      if (Config::kStagesQ == 1) load_waiting_v();
      if (block == blocks.end - 1) publish(work, true);
      load_waiting_v();
      waiting_ = keys;
      waiting_block_ = block;
    }
  }

  // Keys and values of one head of one sequence.
  struct Keys {
    int batch, head, start, seqlen;
  };

  // Tells the others about a tile, with its Q where it has any keys.
  __device__ void publish(const Work& work, bool with_q) {
    q_.wait_empty();
    if (first_) {
      memory_.write_work(q_.stage(), work);
      if (with_q) {
        arrive_expecting(q_.full(), Memory::kQBytes);
        for (int w = 0; w < Config::kWarpgroups; ++w)
          load_tile(memory_.q(q_.stage(), w), call_.q, work.q_start + work.row_begin + w * kWarpgroupRows, work.head,
                    p_.cu_seqlens_q ? 0 : work.batch, q_.full());
      } else {
        arrive(q_.full());
      }
    }
    q_.advance();
  }

  __device__ void load_k(const Keys& keys, int block) {
    k_.wait_empty();
    if (first_) {
      arrive_expecting(k_.full(), Memory::K::kBytes);
      load_tile(memory_.k(k_.stage()), call_.k, keys.start + block * Config::kKeys, keys.head, keys.batch, k_.full());
    }
    k_.advance();
  }

  __device__ void load_waiting_v() {
    if (waiting_block_ < 0) return;
    const int key = waiting_block_ * Config::kKeys, valid = waiting_.seqlen - key;
    // Where the tensor goes on after the sequence. Masked keys have P = 0, but 0 times what lies there may be NaN.
    const bool tail = valid < Config::kKeys && (p_.cu_seqlens_k || p_.seqused_k);
    v_.wait_empty();
    if (first_) {
      const uint32_t barrier = tail ? memory_.tail_full() : v_.full();
      arrive_expecting(barrier, Memory::V::kBytes);
      load_tile(memory_.v(v_.stage()), call_.v, waiting_.start + key, waiting_.head, waiting_.batch, barrier);
    }
    if (tail) {
      wait(memory_.tail_full(), tail_parity_);
      tail_parity_ ^= 1;
      clear_rows(memory_.v(v_.stage()), valid);
      fence_async_proxy();
      __syncwarp();
      if (first_) arrive(v_.full());
    }
    v_.advance();
    waiting_block_ = -1;
  }

  const ForwardCall& call_;
  const Problem& p_;
  const Memory memory_;
  typename Memory::RingQ q_;
  typename Memory::RingK k_;
  typename Memory::RingV v_;
  const bool first_;  // the lane that talks to the accelerator
  Keys waiting_ = {};
  int waiting_block_ = -1;  // of V; none
  uint32_t tail_parity_ = 0;
};

// Whether the accelerator may store all rows of a warpgroup: those past a sequence's end are not ours.
__device__ __forceinline__ bool stored_whole(const Work& work, int warpgroup) {
  return work.row_begin + (warpgroup + 1) * kWarpgroupRows <= work.band.seqlen_q;
}

// Stores O of every tile.
template <class T, class Config>
__device__ void store_tiles(const ForwardCall& call, const ForwardMemory<T, Config>& memory) {
  using Memory = ForwardMemory<T, Config>;
  typename Memory::RingQ q = memory.ring_q();
#pragma unroll 1
  for (;; q.advance()) {
    q.wait_full();
    const Work work = memory.read_work(q.stage());
    if (work.batch < 0) break;
    wait(memory.out_full(q.stage()), q.parity());
    if (lane_index() != 0) continue;
    for (int w = 0; w < Config::kWarpgroups; ++w)
      if (stored_whole(work, w))
        for (int block = 0; block < Memory::O::kBlocks; ++block)
          store_box(call.out, block * kBoxCols, work.q_start + work.row_begin + w * kWarpgroupRows, work.head,
                    call.p.cu_seqlens_q ? 0 : work.batch, memory.o(q.stage(), w).address(0, block * kBoxCols));
    commit_stores();
    wait_stores_read<0>();
    arrive(q.empty());
  }
  wait_stores<0>();
}

}  // namespace fae::sm90
