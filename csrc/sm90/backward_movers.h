#pragma once

#include "backward_memory.h"
#include "backward_wave.h"
#include "tensor_map.h"

// The warps of the backward that do not compute: one loads, two keep the order of the visits to dQ, and one stores the
// gradient of a bias where dS is that.

namespace fae::sm90 {

// PackedBlocks[number], by a whole warp, whose lanes look at 32 sequences at a time: one after the other, the journeys
// to memory would take as long as a step.
__device__ inline Tile find_block(const PackedBlocks& blocks, int number) {
  int first = 0, count = blocks.batch;
#pragma unroll 1
  while (count > 1) {
    const int stride = ceil_div(count, cuda::kWarpThreads), i = lane_index() * stride;
    const bool begins = i < count && blocks.first(first + i) <= number;
    const int last = max(__popc(__ballot_sync(0xffffffffu, begins)) - 1, 0);
    first += last * stride;
    count = min(stride, count - last * stride);
  }
  return {first, 0, number - blocks.first(first)};
}

// Takes tasks and loads K and V, and Q, dO and the statistics of the query blocks that see them.
template <class T, class Config>
class BackwardLoader {
  using Memory = BackwardMemory<T, Config>;
  using Buffers = typename Memory::Buffers;
  using QueryBuffers = typename Memory::QueryBuffers;

 public:
  __device__ BackwardLoader(const BackwardCall& call, const Memory& memory)
      : call_(call), p_(call.p), memory_(memory), first_(lane_index() == 0) {}

  __device__ void run() {
    // A ticket is drawn when all of the block before it is on its way: those who wait for it expect it to begin soon.
#pragma unroll 1
    while (true) {
      const unsigned number = take();
      if (number >= call_.tasks.size()) break;
      run_task(call_.tasks.template tile<Config::kGoesRound>(number, find_block));
    }
    publish({.batch = -1});
    wait_q_empty();
    if (first_) {
      write_struct(memory_.step(step_), Step{.last_place = -1});
      arrive(memory_.q_full(QueryBuffers::stage(step_)));
    }
  }

 private:
  // Tickets rather than block indices: a thread block waits for visits of lower tickets, which are certain to run, and
  // of others only when these run (backward_wave.h).
  __device__ unsigned take() const {
    return static_cast<unsigned>(uniform(first_ ? static_cast<int>(atomicAdd(call_.ticket, 1ull)) : 0));
  }

  // The last task of a wave that was given up makes up for the visits of those before it (backward_wave.h).
  __device__ void run_task(const Tile& tile) {
    int missed = 0;
#pragma unroll 1
    do {
      const bool again = missed > 0;
      const int before = load({tile.batch, tile.head, tile.block - missed}, again);
      missed = again ? missed - 1 : before;
    } while (missed > 0);
  }

  // Loads all steps of a task or, again, those of which it made no visits. Returns for how many tasks before this one
  // that has to be done.
  __device__ int load(const Tile& tile, bool again) {
    const bool last_first = call_.tasks.is_last_first(tile.head);
    const Sequence s = sequence_of(p_, tile.batch);
    if (tile.block < 0 || tile.block * Config::kKeys >= s.seqlen_k) return 0;
    const int batch = static_cast<int>(tile.batch), block = static_cast<int>(tile.block);
    const int group = static_cast<int>(static_cast<unsigned>(p_.heads) / static_cast<unsigned>(p_.heads_kv));
    const int key = block * Config::kKeys;
    const cuda::DeviceBand band = band_of<int>(p_, s);
    const auto rows = band.rows_any(key, min(key + Config::kKeys, band.seqlen_k));
    const int before = Config::rows_before(band.seqlen_q), first_block = (rows.begin + before) / Config::kRows;
    const int blocks = rows.empty() ? 0 : ceil_div(rows.end + before, Config::kRows) - first_block;
    // Where no query sees the keys, whatever its head, one task writes the zeros.
    const int first_head = static_cast<int>(tile.head), rank = first_head % group;
    const int heads = blocks == 0 || s.seqlen_q <= Config::kFewRows ? group : 1;
    if (heads > 1 && rank > 0) return 0;
    const bool rounds = Config::kGoesRound && call_.waves && heads == 1;
    const Round round(block, rounds ? Round::size(ceil_div(band.seqlen_k, Config::kKeys), blocks) : 1, blocks);
    const bool goes_round = Config::kGoesRound && round.members > 1;
    // The step that goes on with the last query block.
    const int back = round.begin(block) + 1;
    const int start = again ? blocks - 1 : back - 1, steps = again ? blocks - back : blocks;
    KeyBlock keys;
    keys.batch = batch;
    keys.head_kv = first_head / group;
    keys.key_begin = key;
    keys.steps = heads * steps;
    keys.q_start = static_cast<int>(s.q_start);
    keys.k_start = static_cast<int>(s.k_start);
    keys.band = band;
    keys.slot = block + first_slot(call_.key_blocks, batch, keys.head_kv, static_cast<int>(p_.heads_kv),
                                   call_.key_blocks_per_head);
    keys.flags = rank << KeyBlock::kRank | (rank + heads == group ? KeyBlock::kLastHead : 0);
    if (again) keys.flags |= KeyBlock::kAgain;
    if (keys.steps == 0) publish(keys);
    const bool makes_up = goes_round && round.is_last(block) && !wave_of(batch, first_head, round).make_whole();
    bool visits_dq = true;
    // So many that they take about as long as it would to make up for the visits.
    int looks = kLooksPerStep * blocks * max(round.members / 2, 1);

#pragma unroll 1
    for (int head = first_head; head < first_head + heads; ++head) {
      // The last place of the first query block.
      const int place0 =
          (Config::kRows - 1 - before) / Config::kPlaceRows +
          first_slot(call_.query_places, batch, head, static_cast<int>(p_.heads), call_.query_places_per_head);
      // Key blocks that were handed out from the first one on walk the queries towards the start, others towards the
      // end: each follows its predecessor at a distance, unless they go round.
#pragma unroll 1
      for (int i = 0; i < steps;) {
        int number = last_first ? i : start - i;
        if (number < 0) number += blocks;
        if (goes_round && i == back && !again) {
          const Wave wave = wave_of(batch, head, round);
          if (looks > 0 && wave.is_open()) {
            --looks;
            continue;
          }
          visits_dq = wave.is_whole_or_given_up();
        }
        const int query_block = first_block + number;
        const int row = query_block * Config::kRows - before, row_end = min(row + Config::kRows, band.seqlen_q);
        const auto visible = band.any(max(row, 0), row_end), every = band.every(max(row, 0), row_end);
        const int first = visible.begin / Config::kKeys, visits = ceil_div(visible.end, Config::kKeys) - first;
        const int visit =
            last_first ? first + visits - 1 - block : (goes_round ? round.visit(block, number) : block) - first;
        Step step{row, head, place0 + query_block * (Config::kRows / Config::kPlaceRows), visit << Step::kRank};
        if (visit == visits - 1) step.flags |= Step::kLastVisit;
        if (!visits_dq) step.flags = Step::kNoVisit | Step::kLastVisit;
        for (int piece = 0; piece < Config::kKeyPieces; ++piece) {
          const int begin = key + piece * kWarpgroupRows;
          if (every.begin > begin || every.end < begin + kWarpgroupRows) step.flags |= Step::kEdge << piece;
        }
        load_rows(keys, step, head == first_head && i == 0);
        ++i;
      }
    }
    if (!visits_dq) {
      wait_for_rows();
      wave_of(batch, first_head, round).leave();
    }
    if (!makes_up) return 0;
    wave_of(batch, first_head, round).wait_for_others(round.members);
    return round.members - 1;
  }

  // At whether a wave is whole. By estimate, not measured: they take about as long as a step of scores without terms.
  static constexpr int kLooksPerStep = 3;
  __device__ Wave wave_of(int batch, int head, const Round& round) const {
    return Wave(call_.waves + round.first +
                first_slot(call_.key_blocks, batch, head, static_cast<int>(p_.heads), call_.key_blocks_per_head));
  }

  // The first slot, or place, of a sequence and head.
  __device__ static int first_slot(const PackedBlocks& packed, int batch, int head, int heads, int blocks_per_head) {
    return packed.cu_seqlens ? packed.first(batch) + head * blocks_per_head : (batch * heads + head) * blocks_per_head;
  }

  __device__ void wait_q_empty() const {
    wait(memory_.q_empty(QueryBuffers::stage(step_)), QueryBuffers::parity(step_) ^ 1);
  }
  // Until Q and the statistics of all steps so far have arrived.
  __device__ void wait_for_rows() const {
    for (unsigned number = step_ - min(step_, Config::kStagesQ); number != step_; ++number)
      wait(memory_.q_full(QueryBuffers::stage(number)), QueryBuffers::parity(number));
  }

  // Tells those that compute about a key block, with K and V where any rows see it. The places of K and V become free
  // before the key block's does: while the last dQ, dK and dV leave.
  __device__ void publish(const KeyBlock& keys) {
    const bool visible = keys.batch >= 0 && keys.steps > 0;
    if (visible) load_keys(keys);
    wait(memory_.key_block_empty(), block_ % 2 ^ 1);
    ++block_;
    if (first_) write_struct(memory_.key_block(), keys);
    if (visible) clear_keys(keys);
    if (first_) arrive(memory_.k_full());
    if (first_ && visible) arrive(memory_.v_full());
  }

  // Where tensors go on after the sequence, what lies there may be NaN.
  __device__ bool clears(const KeyBlock& keys) const {
    return keys.band.seqlen_k - keys.key_begin < Config::kKeys && (p_.cu_seqlens_k || p_.seqused_k);
  }
  __device__ void load_keys(const KeyBlock& keys) {
    wait(memory_.keys_empty(), keys_parity_ ^ 1);
    keys_parity_ ^= 1;
    if (!first_) return;
    const auto load = [&](const TensorMap& map, uint32_t full, auto&& place) {
      const uint32_t barrier = clears(keys) ? memory_.keys_tail_full() : full;
      expect(barrier, Memory::kKeysBytes);
      for (int piece = 0; piece < Config::kKeyPieces; ++piece)
        load_tile(place(piece), map, keys.k_start + keys.key_begin + piece * kWarpgroupRows, keys.head_kv,
                  p_.cu_seqlens_k ? 0 : keys.batch, barrier);
    };
    load(call_.k, memory_.k_full(), [&](int piece) { return memory_.k(piece); });
    load(call_.v, memory_.v_full(), [&](int piece) { return memory_.v(piece); });
  }
  __device__ void clear_keys(const KeyBlock& keys) {
    if (!clears(keys)) return;
    if (first_) arrive(memory_.keys_tail_full());
    wait(memory_.keys_tail_full(), keys_tail_parity_);
    keys_tail_parity_ ^= 1;
    for (int piece = 0; piece < Config::kKeyPieces; ++piece) {
      const int first = max(keys.band.seqlen_k - keys.key_begin - piece * kWarpgroupRows, 0);
      clear_rows(memory_.k(piece), first, kWarpgroupRows);
      clear_rows(memory_.v(piece), first, kWarpgroupRows);
    }
    fence_async_proxy();
    __syncwarp();
  }

  // Q, dO, the statistics and the overlay of a step, and behind the first step's, which need not wait for the places of
  // those, K and V.
  __device__ void load_rows(const KeyBlock& keys, const Step& step, bool with_keys) {
    const int q_stage = QueryBuffers::stage(step_), stage = Buffers::stage(step_);
    const int row = keys.q_start + step.row_begin;
    const int batch = p_.cu_seqlens_q ? 0 : keys.batch;
    const int begin = max(-step.row_begin, 0), end = min(keys.band.seqlen_q - step.row_begin, Config::kRows);
    const bool clears = (begin > 0 || end < Config::kRows) && (p_.cu_seqlens_q || p_.seqused_q);
    const uint32_t q_barrier = clears ? memory_.rows_tail_full() : memory_.q_full(q_stage);
    const uint32_t dout_barrier = clears ? memory_.rows_tail_full() : memory_.dout_full(stage);
    wait_q_empty();
    if (first_) {
      write_struct(memory_.step(step_), step);
      constexpr int kBytes = Memory::Q::kBytes + Memory::kStatisticsBytes;
      arrive_expecting(q_barrier, clears ? kBytes + Memory::kDoutBytes : kBytes);
      load_box(memory_.statistics(q_stage), call_.statistics, 0, row >> call_.statistics_group_bits, step.head, batch,
               q_barrier);
      load_tile(memory_.q(q_stage), call_.q, row, step.head, batch, q_barrier);
    }
    wait(memory_.dout_empty(stage), Buffers::parity(step_) ^ 1);
    if (first_) {
      if (!clears) arrive_expecting(dout_barrier, Memory::kDoutBytes);
      load_tile(memory_.dout(stage), call_.dout, row, step.head, batch, dout_barrier);
      if constexpr (Memory::kHasOverlay)
        load_overlay_tile(memory_.overlay(stage), call_.overlay, overlay_of<Config::kOverlay>(p_), step.row_begin,
                          keys.key_begin, step.head, keys.batch, dout_barrier);
    }
    if (with_keys) publish(keys);
    if (clears) {
      wait(memory_.rows_tail_full(), rows_tail_parity_);
      rows_tail_parity_ ^= 1;
      const auto clear = [&](int first, int last) {
        clear_rows(memory_.q(q_stage), first, last);
        clear_rows(memory_.dout(stage), first, last);
        clear_statistics(memory_.statistics(q_stage), first, last);
      };
      clear(0, begin);
      clear(end, Config::kRows);
      fence_async_proxy();
      __syncwarp();
      if (first_) {
        arrive(memory_.q_full(q_stage));
        arrive(memory_.dout_full(stage));
      }
    }
    ++step_;
  }

  const BackwardCall& call_;
  const BackwardProblem& p_;
  const Memory memory_;
  const bool first_;  // the lane that talks to the accelerator
  unsigned step_ = 0, block_ = 0;
  uint32_t keys_parity_ = 0, keys_tail_parity_ = 0, rows_tail_parity_ = 0;
};

// Where dS is the gradient of the bias, stores it as it lies in shared memory for dQ. One thread. What follows a
// sequence's end is zero: those rows of dO and delta are, and those keys have been hidden.
template <class T, class Config>
__device__ void store_dbias(const BackwardCall& call, const BackwardMemory<T, Config>& memory) {
  using Memory = BackwardMemory<T, Config>;
  using Buffers = typename Memory::Buffers;
  unsigned number = 0;
#pragma unroll 1
  for (unsigned block = 0;; ++block) {
    wait(memory.k_full(), block % 2);
    const KeyBlock keys = read_struct_alone<KeyBlock>(memory.key_block());
    if (keys.batch < 0) break;
#pragma unroll 1
    for (int left = keys.steps; left > 0; --left, ++number) {
      const int stage = Buffers::stage(number);
      wait(memory.ds_full(stage), Buffers::parity(number));
      const Step step = read_struct_alone<Step>(memory.step(number));
      if (call.direct_dbias && !keys.again()) {
        store_overlay_tile(memory.ds(stage), call.dbias, call.p.dbias, step.row_begin, keys.key_begin, step.head,
                           keys.batch);
        commit_stores();
        wait_stores_read<0>();
      }
      arrive(memory.ds_empty(stage));
      arrive(memory.q_empty(Memory::QueryBuffers::stage(number)));
    }
    arrive(memory.key_block_empty());
  }
  wait_stores<0>();
}

// dQ of a query block belongs to one visitor after the other. Two threads keep the order, one that waits for this
// thread block's turns and one that passes them on: the release of one takes as long as half a step, and must not hold
// up the next.

// f(step, number) for every step of the thread block. One thread.
template <class T, class Config, class F>
__device__ __forceinline__ void for_each_step(const BackwardMemory<T, Config>& memory, F&& f) {
  using QueryBuffers = typename BackwardMemory<T, Config>::QueryBuffers;
#pragma unroll 1
  for (unsigned number = 0;; ++number) {
    wait(memory.q_full(QueryBuffers::stage(number)), QueryBuffers::parity(number));
    const Step step = read_struct_alone<Step>(memory.step(number));
    if (step.last_place < 0) return;
    arrive(memory.q_empty(QueryBuffers::stage(number)));
    f(step, number);
  }
}

// What other blocks have added is there when `turn` ends its phase.
template <class T, class Config>
__device__ void wait_for_turns(const BackwardCall& call, const BackwardMemory<T, Config>& memory) {
  for_each_step(memory, [&](const Step& step, unsigned number) {
    if (step.rank() > 0) {
      const int* const done = call.turns + step.last_place;
      while (sm80::load_relaxed(done) < step.rank()) {
      }
      sm80::load_acquire(done);
    }
    arrive(memory.turn(number));
  });
}

// What this one has added before `added` ends its phase is there for the next visitor.
template <class T, class Config>
__device__ void pass_turns_on(const BackwardCall& call, const BackwardMemory<T, Config>& memory) {
  for_each_step(memory, [&](const Step& step, unsigned number) {
    wait(memory.added(number), BackwardMemory<T, Config>::StepBuffers::parity(number));
    if (!step.last_visit()) sm80::store_release(call.turns + step.last_place, step.rank() + 1);
  });
}

}  // namespace fae::sm90
