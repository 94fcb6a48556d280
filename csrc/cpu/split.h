#pragma once

#include "../core/schedule.h"

// How the backward pass is cut into tasks. One task computes a rectangle of a KV head's scores: some of the query heads
// that share it, against one chunk of keys. dQ then comes in one partial sum per chunk, dK and dV in one per share of
// the heads, and the partials are added in a fixed order. The cut depends on shapes alone, so that gradients keep their
// bits for every number of threads; recomputing the scores in two passes instead costs 1.4 to 1.6 times as much.

namespace fae::cpu {

struct BackwardSplit {
  int64_t group;        // query heads per KV head
  int64_t head_splits;  // tasks that share the query heads of a group
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
    const int64_t wanted = pairs > 0 ? ceil_div(kTasks, pairs) : 1;
    head_splits = wanted < group ? wanted : (group > 0 ? group : 1);

    const int64_t bytes_per_chunk = group * longest_q * dq_row;
    int64_t limit = bytes_per_chunk > 0 ? kPartialBytes / bytes_per_chunk : 1;
    limit = limit < 1 ? 1 : limit;
    chunks = ceil_div(wanted, head_splits);
    chunks = chunks < limit ? chunks : limit;
    chunk_keys = round_up(ceil_div(longest_k > 0 ? longest_k : 1, chunks), kMinChunk);
    if (chunk_keys > block_keys) chunk_keys = round_up(chunk_keys, block_keys);
    chunks = longest_k > 0 ? ceil_div(longest_k, chunk_keys) : 1;

    const int64_t bytes_per_pair = chunks * bytes_per_chunk + head_splits * longest_k * dkv_row;
    pairs_at_once = (kPartialBytes + threads * kPartialBytesPerThread) / (bytes_per_pair > 0 ? bytes_per_pair : 1);
    pairs_at_once = pairs_at_once < 1 ? 1 : pairs_at_once > pairs ? pairs : pairs_at_once;
  }

  FAE_INLINE int64_t tasks_per_pair() const { return head_splits * chunks; }
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

}  // namespace fae::cpu
