#pragma once

#include "forward_memory.h"
#include "tensor_map.h"

// The warps of the forward that move tiles between global and shared memory.

namespace fae::sm90 {

// A warpgroup's rows of a tile, and the head that they belong to.
template <class Config>
__device__ __forceinline__ int row_begin_of(const Work& work, int warpgroup) {
  return work.row_begin + warpgroup % Config::kHeadWarpgroups * kWarpgroupRows;
}
template <class Config>
__device__ __forceinline__ int head_of(const Work& work, int warpgroup) {
  return work.head + warpgroup / Config::kHeadWarpgroups;
}

// Takes tiles and loads their Q, K and V; for a gradient also dO and statistics (Config says what is called so).
template <class T, class Config, class Call = ForwardCall>
class Loader {
  using Memory = ForwardMemory<T, Config>;
  // Where tiles wait for tiles before them, those have to be certain to run: none is kept for a thread block that may
  // not have begun.
  static constexpr bool kDrawsAll = Config::kFromKeys;
  static constexpr int kPlannedBlocks = 2;  // that are still to be loaded when the next tile is taken

 public:
  __device__ Loader(const Call& call, const Memory& memory)
      : call_(call),
        p_(call.p),
        memory_(memory),
        q_(memory.ring_q()),
        dout_(memory.ring_dout()),
        k_(memory.ring_k()),
        v_(memory.ring_v()),
        tickets_(memory.ring_tickets()),
        first_(lane_index() == 0) {}

  __device__ void run() {
    plan(0);
    publish(0);
    load_first_k(0);
#pragma unroll 1
    for (unsigned tile = 0;; ++tile) {
      const Work work = memory_.read_work(tile);
      if (work.batch < 0) return;
      load(tile, work);
    }
  }

 private:
  // Takes the next tile that has rows, works out what it needs and leaves that for everybody. The divisions take as
  // long as a block of keys: this happens while loads of the tile before are under way. Where tiles are drawn, while
  // its last ones are: a tile that is taken waits for its thread block, even if others have nothing left to do.
  __device__ void plan(unsigned number) {
    Work work = {.batch = -1};
    index_ = number == 0 && !kDrawsAll ? blockIdx.x : next_index();
#pragma unroll 1
    for (; index_ < static_cast<unsigned>(call_.schedule.size()); index_ = next_index()) {
      Tile tile = call_.schedule[index_];
      if constexpr (Memory::kHasOverlay)
        if (call_.heads_first) tile = {tile.head, tile.batch, tile.block};
      const Sequence s = sequence_of(p_, tile.batch);
      if (tile.block < 0 || tile.block * Config::kRows >= s.seqlen_q) continue;
      const unsigned group = static_cast<unsigned>(p_.heads) / static_cast<unsigned>(p_.heads_kv);
      const int head = static_cast<int>(tile.head) * Config::kHeads;
      [[maybe_unused]] const int head_kv = static_cast<int>(static_cast<unsigned>(head) / group);
      work = {static_cast<int>(tile.batch),
              Config::kFromKeys ? head_kv : head,
              Config::kFromKeys ? head : head_kv,
              static_cast<int>(tile.block) * Config::kRows,
              static_cast<int>(s.q_start),
              static_cast<int>(s.k_start),
              band_of<int>(p_, s)};
      break;
    }
    // Every lane for the rows of one warpgroup, the last for all of them.
    const int part = min(lane_index(), Config::kWarpgroups);
    const bool all = part == Config::kWarpgroups;
    const int row = work.row_begin + (all ? 0 : part % Config::kHeadWarpgroups * kWarpgroupRows);
    const int row_end = min(row + (all ? Config::kRows : kWarpgroupRows), work.band.seqlen_q);
    KeyBlocks<int> blocks(work.band.any(row, row_end), work.band.every(row, row_end), Config::kKeys);
    if constexpr (Config::kHeads > 1) {
      work.first_block = __shfl_sync(0xffffffffu, blocks.begin, Config::kWarpgroups);
      work.head_blocks = __shfl_sync(0xffffffffu, blocks.end, Config::kWarpgroups) - work.first_block;
      const int by = work.numbered_from(all ? 0 : part / Config::kHeadWarpgroups);
      for (int* number : {&blocks.begin, &blocks.full_begin, &blocks.full_end, &blocks.end}) *number += by;
      if (all) blocks.end *= Config::kHeads;
    }
    if (first_) memory_.write_work(number, work);
    if (lane_index() <= Config::kWarpgroups) memory_.write_blocks(number, part, blocks);
    __syncwarp();
  }

  __device__ unsigned next_index() {
    if constexpr (kDrawsAll) return draw_for_both();
    return gridDim.x + (call_.counter ? draw() : index_);
  }
  __device__ unsigned draw() const { return static_cast<unsigned>(uniform(first_ ? atomicAdd(call_.counter, 1) : 0)); }
  // Two thread blocks go through the same tiles: the first of them draws.
  __device__ unsigned draw_for_both() {
    const int stage = tickets_.stage();
    unsigned ticket;
    if (cluster_rank() == 0) {
      ticket = draw();
      tickets_.wait_empty();
      if (first_) store_async(in_block(memory_.ticket(stage), 1), {ticket, 0, 0, 0}, in_block(tickets_.full(), 1));
    } else {
      if (first_) arrive_expecting(tickets_.full(), 16);
      tickets_.wait_full();
      ticket = static_cast<unsigned>(uniform(static_cast<int>(sm80::load_shared(memory_.ticket(stage)))));
      arrive_in_block_if(in_block(tickets_.empty(), 0), first_);
    }
    tickets_.advance();
    return ticket;
  }

  // In the order in which things are used: blocks from the last to the first, and if V is late, behind the K of the
  // block after it. The first K has been loaded with the tile before.
  __device__ void load(unsigned number, const Work& work) {
    const KeyBlocks<int> blocks = memory_.read_blocks(number, Config::kWarpgroups);
    const Keys keys = keys_of(work);
    if constexpr (Config::kHasDout) load_rows(dout_, memory_.dout(dout_.stage(), 0), call_.dout, work, !blocks.empty());
    if (!Config::kLatePv && !blocks.empty()) load_v(keys, blocks.end - 1);
    const int planned =
        Config::kPlansLate && call_.counter ? min(blocks.end - 1, blocks.begin + kPlannedBlocks) : blocks.end - 1;
#pragma unroll 1
    for (int block = blocks.end - 1;; --block) {
      if (block == planned) plan(number + 1);
      if (block <= blocks.begin) break;
      load_k(keys, block - 1);
      load_v(keys, Config::kLatePv ? block : block - 1);
    }
    // In the order in which places become free: the next Q's when O of the tile before has left it (one alone: when the
    // last scores are there); those of the last V and the next K when blocks of this tile have been used, or, if it has
    // few, of the tile before.
    const int count = blocks.end - blocks.begin;
    const bool q_comes_last = Config::kStagesQ == 1 || (count <= Config::kStagesV && count < Config::kStagesK);
    if (!q_comes_last) publish(number + 1);
    if (Config::kLatePv && !blocks.empty()) load_v(keys, blocks.begin);
    load_first_k(number + 1);
    if (q_comes_last) publish(number + 1);
  }

  // Keys and values of one head of one sequence, or of a tile's several heads.
  struct Keys {
    int batch, head, start, seqlen;
    int head_blocks, first_block, second_head;
  };

  __device__ Keys keys_of(const Work& work) const {
    const unsigned group =
        Config::kHeads == 1 ? 1 : static_cast<unsigned>(p_.heads) / static_cast<unsigned>(p_.heads_kv);
    return {p_.cu_seqlens_k ? 0 : work.batch,
            work.head_kv,
            work.k_start,
            work.band.seqlen_k,
            work.head_blocks,
            work.first_block,
            static_cast<int>(static_cast<unsigned>(work.head + 1) / group)};
  }

  // Hands a tile that has been planned to the others, with its Q where it has any keys.
  __device__ void publish(unsigned number) {
    const bool any = !memory_.read_blocks(number, Config::kWarpgroups).empty();
    load_rows(q_, memory_.q(q_.stage(), 0), call_.q, memory_.read_work(number), any);
  }

  // Q or dO of a tile, or nothing. `place` is the ring's next one, the first warpgroup's share of it.
  using RingQ = typename Memory::RingQ;
  using Rows = typename Memory::Q;
  __device__ void load_rows(RingQ& ring, const Rows& place, const TensorMap& map, const Work& work, bool any) {
    ring.wait_empty();
    if (first_ && any) {
      arrive_expecting(ring.full(), Config::kWarpgroups * Rows::kBytes);
      for (int w = 0; w < Config::kWarpgroups; ++w)
        load_tile(Rows{place.base + w * Rows::kBytes}, map, work.q_start + row_begin_of<Config>(work, w),
                  head_of<Config>(work, w), p_.cu_seqlens_q ? 0 : work.batch, ring.full());
    } else if (first_) {
      arrive(ring.full());
    }
    ring.advance();
  }

  __device__ void load_first_k(unsigned number) {
    const KeyBlocks<int> blocks = memory_.read_blocks(number, Config::kWarpgroups);
    if (!blocks.empty()) load_k(keys_of(memory_.read_work(number)), blocks.end - 1);
  }
  __device__ void load_k(const Keys& keys, int block) {
    constexpr bool kWithStatistics = Config::kHasStatistics;
    load<kWithStatistics>(k_, memory_.k(k_.stage()), call_.k, keys, block, Config::kClearsK);
  }
  __device__ void load_v(const Keys& keys, int block) {
    load<false>(v_, memory_.v(v_.stage()), call_.v, keys, block, true);
  }
  // `tile` is the ring's next place. clears: weights of 0 do not hide what lies behind the sequence where the tensor
  // goes on, since 0 times NaN is NaN.
  template <bool kWithStatistics, class Ring, class Tile>
  __device__ void load(Ring& ring, const Tile& tile, const TensorMap& map, const Keys& keys, int number, bool clears) {
    int block = number, head = keys.head;
    if constexpr (Config::kHeads > 1) {
      const bool second = number >= keys.head_blocks;
      if (second) head = keys.second_head;
      block += keys.first_block - (second ? keys.head_blocks : 0);
    }
    const int key = block * Config::kKeys, valid = keys.seqlen - key;
    const bool tail = clears && valid < Config::kKeys && (p_.cu_seqlens_k || p_.seqused_k);
    ring.wait_empty();
    if (first_) {
      const uint32_t barrier = tail ? memory_.tail_full() : ring.full();
      arrive_expecting(barrier, Tile::kBytes + (kWithStatistics ? Memory::kStatisticsBytes : 0));
      load_tile(tile, map, keys.start + key, head, keys.batch, barrier);
      if constexpr (kWithStatistics)
        load_box(memory_.statistics(ring.stage()), call_.statistics, 0, keys.start + key, head, keys.batch, barrier);
    }
    if (tail) {
      wait(memory_.tail_full(), tail_parity_);
      tail_parity_ ^= 1;
      clear_rows(tile, valid, Tile::kRows);
      if constexpr (kWithStatistics) clear_statistics(memory_.statistics(ring.stage()), valid, Config::kKeys);
      fence_async_proxy();
      __syncwarp();
      if (first_) arrive(ring.full());
    }
    ring.advance();
  }

  const Call& call_;
  const Problem& p_;
  const Memory memory_;
  RingQ q_, dout_;
  typename Memory::RingK k_;
  typename Memory::RingV v_;
  typename Memory::RingP tickets_;
  unsigned index_ = 0;  // of the last tile that was taken
  const bool first_;    // the lane that talks to the accelerator
  uint32_t tail_parity_ = 0;
};

// Whether the accelerator may store all rows of a warpgroup: those past a sequence's end are not ours.
template <class Config>
__device__ __forceinline__ bool stored_whole(const Work& work, int warpgroup) {
  return row_begin_of<Config>(work, warpgroup) + kWarpgroupRows <= work.band.seqlen_q;
}

// Loads the overlay of every tile: for each warpgroup, of the blocks that its rows see.
template <class T, class Config>
__device__ void load_overlay(const ForwardCall& call, const ForwardMemory<T, Config>& memory) {
  using Memory = ForwardMemory<T, Config>;
  typename Memory::RingQ q = memory.ring_q();
  unsigned loaded[Config::kWarpgroups] = {};
#pragma unroll 1
  for (unsigned tile = 0;; ++tile, q.advance()) {
    q.wait_full();
    const Work work = memory.read_work(tile);
    if (work.batch < 0) return;
    const KeyBlocks<int> blocks = memory.read_blocks(tile, Config::kWarpgroups);
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.begin; --block)
#pragma unroll
      for (int w = 0; w < Config::kWarpgroups; ++w) {
        const KeyBlocks<int> seen = memory.read_blocks(tile, w);
        if (block < seen.begin || block >= seen.end) continue;
        const auto ring = memory.ring_overlay(w, loaded[w]++);
        ring.wait_empty();
        if (lane_index() != 0) continue;
        arrive_expecting(ring.full(), Memory::Overlay::kBytes);
        load_overlay_tile(memory.overlay(ring.stage(), w), call.overlay, overlay_of<Config::kOverlay>(call.p),
                          row_begin_of<Config>(work, w), block * Config::kKeys, work.head, work.batch, ring.full());
      }
    release(q.empty());  // the next tile may take the place of what has been read
  }
}

// Stores O of every tile.
template <class T, class Config>
__device__ void store_tiles(const ForwardCall& call, const ForwardMemory<T, Config>& memory) {
  using Memory = ForwardMemory<T, Config>;
  typename Memory::RingQ q = memory.ring_q();
#pragma unroll 1
  for (unsigned tile = 0;; ++tile, q.advance()) {
    q.wait_full();
    const Work work = memory.read_work(tile);
    if (work.batch < 0) break;
    wait(memory.out_full(q.stage()), q.parity());
    if (lane_index() != 0) continue;
    for (int w = 0; w < Config::kWarpgroups; ++w)
      if (stored_whole<Config>(work, w))
        for (int block = 0; block < Memory::O::kBlocks; ++block)
          store_box(call.out, block * kBoxCols, work.q_start + row_begin_of<Config>(work, w), head_of<Config>(work, w),
                    call.p.cu_seqlens_q ? 0 : work.batch, memory.o(q.stage(), w).address(0, block * kBoxCols));
    commit_stores();
    wait_stores_read<0>();
    arrive(q.empty());
  }
  wait_stores<0>();
}

}  // namespace fae::sm90
