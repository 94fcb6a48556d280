#pragma once

#include <algorithm>

#include "../core/backend.h"
#include "../core/schedule.h"

// What backward kernels have in common that work on blocks of keys and add up dQ of blocks of queries in global memory:
// the workspace, and the order of the work.

namespace fae::cuda {

// What fits into the second-level cache beside everything else.
constexpr int64_t kCachedQueryBytes = int64_t{32} << 20;

// Consecutive key blocks of a head run together and share the queries in the second-level cache. So many heads go
// together that a key block's slot is free when its successors have begun, of `slots` that there are: those of as many
// sequences where several lie one behind the other, but no more than have their queries, and dQ, in the cache.
template <class T, class Config>
int64_t heads_side_by_side(const BackwardProblem& p, const GridSchedule& schedule, int64_t slots) {
  const int64_t key_blocks = ceil_div(int64_t{schedule.blocks}, p.cu_seqlens_k ? std::max<int64_t>(1, p.batch) : 1);
  const int64_t heads = ceil_div(slots, std::max<int64_t>(1, key_blocks));
  if (!p.cu_seqlens_k) return heads;
  constexpr int64_t kRowBytes = Config::kDim * (2 * sizeof(T) + sizeof(float));  // of Q, dO and dQ
  return std::min(heads, kCachedQueryBytes / (std::max<int64_t>(1, p.max_seqlen_q) * kRowBytes));
}

struct BackwardSpace {
  int64_t query_blocks, heads;  // per head; heads, of all sequences where tensors are not packed
  StatsView delta;
  int* counters;  // the ticket (64 bits), then the visitors that are done with each query block, then others
  int64_t counter_count;
  int32_t *cu_seqlens_q, *cu_seqlens_k;
  float* dq_partial;  // of every query block, unless one block has all keys: then dQ never leaves registers unfinished
  size_t bytes = 0;

  // partial_floats: of the dQ of one query block. other_counters: that begin at zero, too. With a null `base`, only
  // `bytes` means anything.
  BackwardSpace(const BackwardProblem& p, void* base, int block_rows, int block_keys, int64_t partial_floats,
                int64_t other_counters = 0)
      : base_(base) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const PackedBlocks blocks(p.cu_seqlens_q, p.batch, p.total_q, block_rows);
    query_blocks = packed ? blocks.size() : ceil_div(p.max_seqlen_q, int64_t{block_rows});
    heads = packed ? p.heads : p.batch * p.heads;
    const int64_t rows = packed ? p.total_q : p.max_seqlen_q;
    delta.data = take<float>(heads * rows);
    delta.stride_batch = packed ? 0 : p.heads * rows;
    delta.stride_head = rows;
    counter_count = 2 + heads * query_blocks + other_counters;
    counters = take<int>(counter_count);
    cu_seqlens_q = packed ? take<int32_t>(p.batch + 1) : nullptr;
    cu_seqlens_k = packed ? take<int32_t>(p.batch + 1) : nullptr;
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

}  // namespace fae::cuda
