#pragma once

#include "../core/backend.h"
#include "../core/schedule.h"

// What backward kernels have in common that work on blocks of keys and add up dQ of blocks of queries in global memory:
// the order of the work, and the workspace.

namespace fae::cuda {

// What fits into the second-level cache beside everything else.
constexpr int64_t kCachedQueryBytes = int64_t{32} << 20;

// What the order of the tasks follows from, beside the lengths of sequences. Each task is a block of keys of a head.
struct TaskOrder {
  int64_t heads = 0, sharing = 1;  // of all heads, so many neighbours take turns at the same keys
  int64_t block_keys = 0;          // 0: there are no tasks in this order
  int64_t slots = 0;               // for tasks that run at the same time
  int64_t row_bytes = 0;           // of Q, dO and dQ
  bool even = false;               // all tasks take equally long
  bool alternates = true;          // every other head has its last block first
  bool rounds = false;             // key blocks may go round (core/schedule.h, Round)

  static constexpr int64_t kFewBlocks = 4;  // hardly wait for each other

  // Consecutive key blocks of a head run together and share the queries in the second-level cache. So many heads go
  // together that a key block's slot is free when its successors have begun: those of as many sequences where several
  // lie one behind the other, but no more than have their queries, and dQ, in the cache. Packed sequences are ordered
  // as those of a batch where that has no more numbers without a task: then they are all about as long.
  //
  // Groups of even tasks that fill the slots exactly begin and end in step: a third to a half more heads go together
  // (measured for sm90, as docs/kernels.md tells).
  FAE_INLINE GridSchedule schedule(int64_t batch, int64_t longest_q, int64_t longest_k, const int32_t* cu_seqlens_k,
                                   int64_t total_k) const {
    GridSchedule result(batch, heads, longest_k, block_keys, nullptr, 0);
    const GridSchedule packed(batch, heads, longest_k, block_keys, cu_seqlens_k, total_k);
    if (result.tasks > packed.tasks) result = packed;
    const int64_t sequences = result.packed.cu_seqlens && batch > 0 ? batch : 1;
    const int64_t key_blocks = result.blocks > 0 ? ceil_div(int64_t{result.blocks}, sequences) : 1;
    int64_t least = ceil_div(slots, key_blocks);
    if (result.packed.cu_seqlens)
      least = clamp_length(least, kCachedQueryBytes / ((longest_q > 0 ? longest_q : 1) * row_bytes));
    int64_t most = result.blocks > kFewBlocks ? 2 * least : least;
    if (even) {
      least = ceil_div(4 * slots, 3 * key_blocks);
      most = ceil_div(3 * slots, 2 * key_blocks) + 1;
    }
    // The waves of a head follow each other at a distance, and most often find room.
    if (rounds) {
      result.wave = Round::kMost;
      least = slots / (key_blocks < Round::kMost ? key_blocks : Round::kMost);
      most = 2 * least;
    }
    result.take_turns(sharing, least, most, alternates);
    return result;
  }
};

template <class T, class Config>
TaskOrder task_order(int64_t heads, int64_t sharing, int64_t slots) {
  return {.heads = heads,
          .sharing = sharing,
          .block_keys = Config::kKeys,
          .slots = slots,
          .row_bytes = Config::kDim * static_cast<int64_t>(2 * sizeof(T) + sizeof(float))};
}

struct BackwardSpace {
  int64_t query_blocks, heads;  // blocks of block_rows rows, per head; heads, of all sequences if these are not packed
  StatsView delta;              // null: only statistics have it (cuda/delta.h)
  int* counters;  // the ticket (64 bits), then the visitors that are done with each query block, then others
  int64_t counter_count;
  int32_t *cu_seqlens_q, *cu_seqlens_k;
  GridSchedule* packed_tasks;  // what a TaskOrder makes of the lengths, which only the device knows
  float* dq_partial;  // of every query block, unless one block has all keys: then dQ never leaves registers unfinished
  size_t bytes = 0;

  // partial_floats: of the dQ of block_rows rows. other_counters: that begin at zero, too. With a null `base`, only
  // `bytes` means anything.
  BackwardSpace(const BackwardProblem& p, void* base, int block_rows, int block_keys, int64_t partial_floats,
                int64_t other_counters = 0, bool keeps_delta = true)
      : base_(base) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const PackedBlocks blocks(p.cu_seqlens_q, p.batch, p.total_q, block_rows);
    query_blocks = packed ? blocks.size() : ceil_div(p.max_seqlen_q, int64_t{block_rows});
    heads = packed ? p.heads : p.batch * p.heads;
    const int64_t rows = packed ? p.total_q : p.max_seqlen_q;
    if (keeps_delta) delta.data = take<float>(heads * rows);
    delta.stride_batch = packed ? 0 : p.heads * rows;
    delta.stride_head = rows;
    counter_count = 2 + heads * query_blocks + other_counters;
    counters = take<int>(counter_count);
    cu_seqlens_q = packed ? take<int32_t>(p.batch + 1) : nullptr;
    cu_seqlens_k = packed ? take<int32_t>(p.batch + 1) : nullptr;
    packed_tasks = packed ? take<GridSchedule>(1) : nullptr;
    const bool alone = (packed ? p.total_k : p.max_seqlen_k) <= block_keys;
    dq_partial = take<float>(alone ? 0 : heads * query_blocks * partial_floats);
  }

  unsigned long long* ticket() const { return reinterpret_cast<unsigned long long*>(counters); }
  int* turns() const { return counters + 2; }
  int* others() const { return turns() + heads * query_blocks; }

  // The next `count` elements.
  template <class E>
  E* take(int64_t count) {
    E* const result = base_ ? reinterpret_cast<E*>(static_cast<char*>(base_) + bytes) : nullptr;
    bytes += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 256));
    return result;
  }

 private:
  void* base_;
};

// The tasks of a call, as a GridSchedule.
class Tasks {
  // Code for each of the two: instructions that could take either from a pointer make the loading warp of Hopper spill.
  template <class F>
  FAE_INLINE auto of_schedule(F&& f) const {
    return packed_ ? f(*packed_) : f(dense_);
  }

 public:
  // p, space: as prepare_backward has left them.
  Tasks(const BackwardProblem& p, const TaskOrder& order, const BackwardSpace& space)
      : dense_(p.batch, order.heads, p.max_seqlen_k, order.block_keys, p.cu_seqlens_k, p.total_k),
        packed_(space.packed_tasks),
        most_(dense_.size()) {
    if (!packed_) dense_ = order.schedule(p.batch, p.max_seqlen_q, p.max_seqlen_k, nullptr, 0);
  }
  int64_t most() const { return most_; }  // that there can be, as far as the host knows

  // On the device:
  FAE_INLINE int64_t size() const {
    return of_schedule([](const GridSchedule& schedule) { return schedule.size(); });
  }
  template <bool kWaves, class Find>
  FAE_INLINE Tile tile(uint32_t index, Find&& find) const {
    return of_schedule([&](const GridSchedule& schedule) { return schedule.template tile<kWaves>(index, find); });
  }
  FAE_INLINE Tile operator[](uint32_t index) const {
    return of_schedule([&](const GridSchedule& schedule) { return schedule[index]; });
  }
  FAE_INLINE bool is_last_first(int64_t head) const {
    return of_schedule([&](const GridSchedule& schedule) { return schedule.is_last_first(head); });
  }

 private:
  GridSchedule dense_;
  const GridSchedule* packed_;
  int64_t most_;
};

}  // namespace fae::cuda
