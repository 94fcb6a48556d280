#pragma once

#include "band.h"

// How one call is cut into tasks. A task list depends on shapes only, never on the number of threads or SMs, so that
// results keep their bits whatever runs them.

namespace fae {

FAE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
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

// The key loop of a tile as three runs: [begin, full_begin) and [full_end, end) hold blocks that need element masks,
// [full_begin, full_end) hold blocks that every row sees whole. Ends are block indices.
struct KeyBlocks {
  int64_t begin = 0, full_begin = 0, full_end = 0, end = 0;

  FAE_INLINE KeyBlocks(const Interval& any, const Interval& every, int64_t block_cols) {
    if (any.empty()) return;
    begin = any.begin / block_cols;
    end = ceil_div(any.end, block_cols);
    full_begin = ceil_div(every.begin, block_cols);
    full_end = every.empty() ? full_begin : every.end / block_cols;
    if (full_begin >= full_end) full_begin = full_end = end;
  }
};

}  // namespace fae
