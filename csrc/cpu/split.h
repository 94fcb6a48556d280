#pragma once

#include "../core/schedule.h"

// How the backward pass is cut into tasks. One task computes a rectangle of a KV head's scores: some of the query heads
// that share it, against one chunk of keys. dQ then comes in one partial sum per chunk, dK and dV in one per share of
// the heads, and the partials are added in a fixed order. Where those of all heads would take too much memory, the
// heads come one after the other, in passes. The cut depends on shapes alone, so that gradients keep their bits for
// every number of threads; recomputing the scores in two passes instead costs 1.4 to 1.6 times as much.

namespace fae::cpu {

struct BackwardSplit {
  int64_t group;          // query heads per KV head
  int64_t heads_at_once;  // of which partial sums exist at one time: others come in a pass of their own
  int64_t head_splits;    // tasks that share those
  int64_t chunk_keys, chunks;
  int64_t pairs;          // (batch, KV head) in all
  int64_t pairs_at_once;  // of which partial sums exist at one time

  // `longest_q`, `longest_k`: rows and keys of the longest sequence. `block_keys`: keys that a task holds packed at
  // once; chunks are multiples of it. `dq_row`, `dkv_row`: bytes of a partial sum per query row and per key.
  FAE_INLINE BackwardSplit(const Problem& p, int64_t longest_q, int64_t longest_k, int64_t block_keys, int64_t dq_row,
                           int64_t dkv_row, int threads)
      : group(p.heads_kv > 0 ? p.heads / p.heads_kv : 0), pairs(p.batch * p.heads_kv) {
    constexpr int64_t kTasks = 16, kMinChunk = 256;
    constexpr int64_t kPartialBytes = int64_t{40} << 20, kPartialBytesPerThread = int64_t{8} << 20;
    const int64_t dq_bytes = longest_q * dq_row, dkv_bytes = longest_k * dkv_row;
    const int64_t wanted = pairs > 0 ? ceil_div(kTasks, pairs) : 1;
    heads_at_once = group > 0 ? group : 1;
    head_splits = least(wanted, heads_at_once);
    chunks = ceil_div(wanted, head_splits);
    const bool one_chunk_keeps_dq = longest_k <= block_keys;
    if ((one_chunk_keeps_dq ? 0 : group * dq_bytes) + shared_dkv_bytes(dkv_bytes) > kPartialBytes) {
      // A head in a chunk takes less memory than one more sum of dK and dV.
      heads_at_once = head_splits = 1;
      chunks = wanted;
    }
    const int64_t limit = (kPartialBytes - shared_dkv_bytes(dkv_bytes)) / (heads_at_once * dq_bytes + 1);
    chunks = least(chunks, limit < 1 ? 1 : limit);
    chunk_keys = round_up(ceil_div(longest_k > 0 ? longest_k : 1, chunks), kMinChunk);
    if (chunk_keys > block_keys) chunk_keys = round_up(chunk_keys, block_keys);
    chunks = longest_k > 0 ? ceil_div(longest_k, chunk_keys) : 1;

    const int64_t bytes_per_pair = chunks * heads_at_once * dq_bytes + shared_dkv_bytes(dkv_bytes);
    pairs_at_once = (kPartialBytes + threads * kPartialBytesPerThread) / (bytes_per_pair + 1);
    pairs_at_once = pairs_at_once < 1 ? 1 : least(pairs_at_once, pairs);
  }

  FAE_INLINE int64_t tasks_per_pair() const { return head_splits * chunks; }
  FAE_INLINE int64_t passes() const { return group > heads_at_once ? ceil_div(group, heads_at_once) : 1; }
  // Whether dK and dV of a key come in several parts.
  FAE_INLINE bool shares_dkv() const { return head_splits > 1 || heads_at_once < group; }

  // Query heads of the group that a pass, and one of the tasks that share it, work on.
  FAE_INLINE Interval heads_of(int64_t pass) const {
    return {pass * heads_at_once, least((pass + 1) * heads_at_once, group)};
  }
  FAE_INLINE Interval heads_of(int64_t pass, int64_t share) const {
    const Interval heads = heads_of(pass);
    return {heads.begin + share * heads.size() / head_splits, heads.begin + (share + 1) * heads.size() / head_splits};
  }

 private:
  static FAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  FAE_INLINE int64_t shared_dkv_bytes(int64_t dkv_bytes) const { return shares_dkv() ? head_splits * dkv_bytes : 0; }
};

struct LongestSequence {
  int64_t q = 0, k = 0;

  FAE_INLINE explicit LongestSequence(const Problem& p) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      q = s.seqlen_q > q ? s.seqlen_q : q;
      k = s.seqlen_k > k ? s.seqlen_k : k;
    }
  }
};

// The first block of a sequence among those of all sequences, as a schedule of one head numbers them.
FAE_INLINE int64_t first_block(const GridSchedule& blocks, int64_t batch) {
  return blocks.packed.cu_seqlens ? blocks.packed.first(static_cast<int32_t>(batch)) : batch * blocks.blocks;
}

}  // namespace fae::cpu
