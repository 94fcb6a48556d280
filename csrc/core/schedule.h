#pragma once

#include "band.h"

// How one call is cut into tasks. Where arithmetic follows the cut, the cut follows shapes only, never the number of
// threads or SMs, so that results keep their bits whatever runs them.

namespace fae {

template <class A, class B>
FAE_INLINE std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
FAE_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One block of one head, of rows or, in a backward, of keys: what a task computes.
struct Tile {
  int64_t batch = 0, head = 0, block = 0;
};

// Tasks (batch, head, block) with the block slowest and counted from the end: under a causal mask the last rows are
// the longest tasks, and starting with those lets the short ones fill the gaps.
struct TileSchedule {
  int64_t batch = 0, heads = 0, blocks = 0;

  FAE_INLINE TileSchedule(int64_t batch_, int64_t heads_, int64_t seqlen, int64_t block_rows)
      : batch(batch_), heads(heads_), blocks(ceil_div(seqlen, block_rows)) {}
  FAE_INLINE int64_t size() const { return batch * heads * blocks; }
  FAE_INLINE Tile operator[](int64_t index) const {
    const int64_t pair = index % (batch * heads);
    return {pair / heads, pair % heads, blocks - 1 - index / (batch * heads)};
  }
};

// The blocks of all sequences of a packed tensor, numbered without knowing the lengths: sequence b owns the numbers
// from cu_seqlens[b] / block_rows + b on, which are always enough for it. Some number no block: they lie past the
// sequence.
struct PackedBlocks {
  const int32_t* cu_seqlens = nullptr;
  int32_t batch = 0, total = 0, block_rows = 1;

  PackedBlocks() = default;
  FAE_INLINE PackedBlocks(const int32_t* cu_seqlens_, int64_t batch_, int64_t total_, int64_t block_rows_)
      : cu_seqlens(cu_seqlens_),
        batch(static_cast<int32_t>(batch_)),
        total(static_cast<int32_t>(clamp_length(total_, int64_t{INT32_MAX}))),  // cu_seqlens point no further
        block_rows(static_cast<int32_t>(block_rows_)) {}
  FAE_INLINE int32_t size() const { return total / block_rows + batch; }
  FAE_INLINE int32_t first(int32_t b) const {
    return static_cast<int32_t>(static_cast<uint32_t>(clamp_length(cu_seqlens[b], total)) /
                                static_cast<uint32_t>(block_rows)) +
           b;
  }
  // The last sequence that begins at or before `number`.
  FAE_INLINE Tile operator[](int32_t number) const {
    int32_t b = 0;
    for (int32_t above = batch; above - b > 1;) {
      const int32_t middle = (b + above) / 2;
      (first(middle) <= number ? b : above) = middle;
    }
    return {b, 0, number - first(b)};
  }
};

// In a backward where all rows see all keys, the key blocks of a head can go round: they walk the same query blocks,
// from the last one down, but begin at places that are evenly spread, and go on with the last one after the first. dQ
// of a query block has them as visitors in the order in which they come by, and each visitor some steps before the next
// one comes. So each waits for lower numbers up to the first query block, and from there on for higher ones as well:
// all have to run at the same time. That can be asked of so many, a wave, and is only done in whole waves of a size
// that fits several times into the largest cards with little left. It follows from a sequence's lengths, as do the
// sums' orders.
struct Round {
  static constexpr int kLeast = 4, kMost = 64;  // of a wave

  int first = 0, members = 1, query_blocks = 0;  // the wave's key blocks, and those that they walk

  // The wave of a key block.
  FAE_INLINE Round(int key_block, int size, int query_blocks_)
      : first(key_block / size * size), members(size), query_blocks(query_blocks_) {}

  // The size of a sequence's waves. 1: its key blocks don't go round, but follow each other from the last query block
  // on.
  FAE_INLINE static int size(int64_t key_blocks, int64_t query_blocks) {
    const int64_t size = key_blocks > 0 && key_blocks % kMost == 0 ? kMost : key_blocks;
    return size >= kLeast && size <= kMost && size <= query_blocks && (size & (size - 1)) == 0 ? static_cast<int>(size)
                                                                                               : 1;
  }

  FAE_INLINE bool is_last(int key_block) const { return key_block == first + members - 1; }
  // Where a key block begins. The last one of a wave begins at the last query block, all others before that.
  FAE_INLINE int begin(int key_block) const { return ((key_block - first + 1) * query_blocks - 1) / members; }
  // The visits of dQ of a query block before that of a key block, from those of the first wave on.
  FAE_INLINE int visit(int key_block, int query_block) const {
    const int earliest = first + query_block * members / query_blocks;  // of those that begin there or before
    return first + key_block - earliest + (key_block < earliest ? members : 0);
  }
};

// Tasks of a grid of thread blocks: (batch, head) pairs in groups, whose tensors share the cache, and in each group the
// tiles with the block, or a wave of blocks, slowest. Lengths are read on the device only. Numbers have 32 bits: a grid
// has no more, and a division of 64 takes a GPU longer than a small tile.
struct GridSchedule {
  int64_t tasks = 0;  // more than 32 bits of them are declined, or do not launch
  uint32_t heads = 0, blocks = 0;
  uint32_t run = 1;  // heads that share something; all tiles of a group's first heads come before its second's
  uint32_t pairs = 0, group = 1;  // of batch and run of heads
  bool last_first = false;
  bool alternate = false;  // groups of even runs, last block first, and of odd runs, first block first, take turns
  uint32_t wave = 1;       // so many blocks of a sequence's head come next to each other; not with the last block first
  PackedBlocks packed;     // null cu_seqlens: every sequence has `blocks` blocks

  FAE_INLINE GridSchedule(int64_t batch, int64_t heads_, int64_t seqlen, int64_t block_rows, const int32_t* cu_seqlens,
                          int64_t total)
      : tasks(batch * heads_ * ceil_div(seqlen, block_rows)),
        heads(static_cast<uint32_t>(heads_)),
        blocks(static_cast<uint32_t>(ceil_div(seqlen, block_rows))),
        pairs(static_cast<uint32_t>(batch * heads_)) {
    if (!cu_seqlens) return;
    packed = PackedBlocks(cu_seqlens, batch, total, block_rows);
    pairs = heads;
    blocks = static_cast<uint32_t>(packed.size());
    tasks = heads_ * packed.size();
  }
  // At least `count` pairs of batch and run go together, and in the last group few less: a small one would begin with
  // long tasks when little else is left.
  FAE_INLINE void group_pairs(int64_t count, int64_t run_ = 1) {
    run = static_cast<uint32_t>(run_);
    pairs /= run;
    const uint32_t groups = pairs / static_cast<uint32_t>(clamp_length(count - 1, int64_t{pairs}) + 1);
    group = groups > 1 ? ceil_div(pairs, groups) : pairs > 0 ? pairs : 1;
  }
  // For tasks that take turns, those of a head's blocks, and those of the same block of the heads of a run; `least` to
  // `most` pairs go together. The order of both follows from the head's number alone, so that its results do not
  // depend on what else there is. Unless runs alternate, and can be paired, all have their first block first.
  FAE_INLINE void take_turns(int64_t run_, int64_t least, int64_t most, bool alternates) {
    run = static_cast<uint32_t>(run_);
    pairs /= run;
    alternate = alternates && heads / run % 2 == 0;
    const uint32_t all = alternate ? pairs / 2 : pairs;
    group = static_cast<uint32_t>(clamp_length(least - 1, int64_t{all} - 1) + 1);
    // In a last group of few pairs, tasks wait for each other while others have none: the fullest, of them the
    // smallest.
    const auto last = [&](uint32_t size) { return uint64_t{all % size == 0 ? size : all % size}; };
    for (uint32_t more = group + 1; more <= most && more <= all; ++more)
      if (last(more) * group > last(group) * more) group = more;
  }
  FAE_INLINE int64_t size() const { return tasks; }
  FAE_INLINE bool is_last_first(int64_t head) const {
    return alternate ? static_cast<uint32_t>(head) / run % 2 == 0 : last_first;
  }

  FAE_INLINE Tile operator[](uint32_t index) const {
    return tile(index, [](const PackedBlocks& blocks, int32_t number) { return blocks[number]; });
  }
  // The same with another way of finding packed blocks: find(packed, number). kWaves: `wave` may be more than 1.
  template <bool kWaves = false, class Find>
  FAE_INLINE Tile tile(uint32_t index, Find&& find) const {
    // With alternate runs, a group of even ones is followed by one of as many odd ones.
    const uint32_t parities = alternate ? 2 : 1, all = pairs / parities, whole = group * parities * run * blocks;
    const uint32_t first = index / whole * group, in_group = all - first < group ? all - first : group;
    uint32_t rest = index % whole;
    const uint32_t parity = rest / (in_group * run * blocks);
    rest -= parity * in_group * run * blocks;
    const uint32_t in_run = run == 1 ? 0 : rest / (in_group * blocks);
    rest -= in_run * in_group * blocks;
    const Wave w = kWaves && wave > 1 ? wave_of(rest / in_group, find) : Wave{rest / in_group, 1};
    rest -= w.begin * in_group;
    const uint32_t member = first + rest / w.size, number = w.begin + rest % w.size;
    const uint32_t per_batch = heads / run / parities, batch = member / per_batch;
    const uint32_t head = ((member - batch * per_batch) * parities + parity) * run + in_run;
    const uint32_t block = is_last_first(head) ? blocks - 1 - number : number;
    if (packed.cu_seqlens) {
      Tile tile = find(packed, static_cast<int32_t>(block));
      tile.head = head;
      return tile;
    }
    return {batch, head, block};
  }

 private:
  struct Wave {
    uint32_t begin, size;  // numbers of blocks
  };
  template <class Find>
  FAE_INLINE Wave wave_of(uint32_t number, Find&& find) const {
    uint32_t first = 0, end = blocks;  // of the sequence
    if (packed.cu_seqlens) {
      const Tile tile = find(packed, static_cast<int32_t>(number));
      first = number - static_cast<uint32_t>(tile.block);
      const auto next = static_cast<int32_t>(tile.batch) + 1;
      if (next < packed.batch) end = static_cast<uint32_t>(packed.first(next));
    }
    const uint32_t begin = first + (number - first) / wave * wave;
    return {begin, end - begin < wave ? end - begin : wave};
  }
};

// The key loop of a tile as three runs: [begin, full_begin) and [full_end, end) hold blocks that need element masks,
// [full_begin, full_end) hold blocks that every row sees whole. Ends are block indices.
template <class Int>
struct KeyBlocks {
  Int begin = 0, full_begin = 0, full_end = 0, end = 0;

  KeyBlocks() = default;
  FAE_INLINE KeyBlocks(const BasicInterval<Int>& any, const BasicInterval<Int>& every, Int block_cols) {
    if (any.empty()) return;
    begin = any.begin / block_cols;
    end = ceil_div(any.end, block_cols);
    full_begin = ceil_div(every.begin, block_cols);
    full_end = every.empty() ? full_begin : every.end / block_cols;
    if (full_begin >= full_end) full_begin = full_end = end;
  }

  FAE_INLINE bool empty() const { return begin >= end; }
  FAE_INLINE bool is_full(Int block) const { return block >= full_begin && block < full_end; }
};

}  // namespace fae
