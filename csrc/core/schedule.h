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

// One block of rows of one head: what a forward task computes.
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
  int64_t batch = 0, total = 0, block_rows = 1;

  FAE_INLINE int64_t size() const { return total / block_rows + batch; }
  FAE_INLINE int64_t first(int64_t b) const { return clamp_length(cu_seqlens[b], total) / block_rows + b; }
  // The last sequence that begins at or before `number`.
  FAE_INLINE Tile operator[](int64_t number) const {
    int64_t b = 0;
    for (int64_t above = batch; above - b > 1;) {
      const int64_t middle = (b + above) / 2;
      (first(middle) <= number ? b : above) = middle;
    }
    return {b, 0, number - first(b)};
  }
};

// Tasks of a grid of thread blocks: (batch, head) pairs in groups, whose tensors share the cache, and in each group the
// tiles with the block slowest. Lengths are read on the device only.
struct GridSchedule {
  int64_t pairs = 0, heads = 0, blocks = 0, group = 1;
  bool last_first = false;
  bool alternate = false;  // groups have their last blocks first in turns, and the last group its first one
  PackedBlocks packed;  // null cu_seqlens: every sequence has `blocks` blocks

  FAE_INLINE GridSchedule(int64_t batch, int64_t heads_, int64_t seqlen, int64_t block_rows, const int32_t* cu_seqlens,
                          int64_t total)
      : pairs(batch * heads_), heads(heads_), blocks(ceil_div(seqlen, block_rows)) {
    if (!cu_seqlens) return;
    packed = {cu_seqlens, batch, total, block_rows};
    pairs = heads;
    blocks = packed.size();
  }
  FAE_INLINE int64_t size() const { return pairs * blocks; }
  // Whether the blocks of the group that a number falls into are counted from the end.
  FAE_INLINE bool is_last_first(int64_t index) const {
    return last_first || (alternate && ((pairs - 1) / group - index / (group * blocks)) % 2 != 0);
  }
  FAE_INLINE Tile operator[](int64_t index) const {
    const int64_t first = index / (group * blocks) * group;
    const int64_t in_group = pairs - first < group ? pairs - first : group;
    const int64_t rest = index - first * blocks;
    const int64_t pair = first + rest % in_group, number = rest / in_group;
    Tile tile = {pair / heads, pair % heads, is_last_first(index) ? blocks - 1 - number : number};
    if (packed.cu_seqlens) {
      tile = packed[tile.block];
      tile.head = pair;
    }
    return tile;
  }
};

// The key loop of a tile as three runs: [begin, full_begin) and [full_end, end) hold blocks that need element masks,
// [full_begin, full_end) hold blocks that every row sees whole. Ends are block indices.
template <class Int>
struct KeyBlocks {
  Int begin = 0, full_begin = 0, full_end = 0, end = 0;

  FAE_INLINE KeyBlocks(const BasicInterval<Int>& any, const BasicInterval<Int>& every, Int block_cols) {
    if (any.empty()) return;
    begin = any.begin / block_cols;
    end = ceil_div(any.end, block_cols);
    full_begin = ceil_div(every.begin, block_cols);
    full_end = every.empty() ? full_begin : every.end / block_cols;
    if (full_begin >= full_end) full_begin = full_end = end;
  }

  FAE_INLINE bool is_full(Int block) const { return block >= full_begin && block < full_end; }
};

}  // namespace fae
