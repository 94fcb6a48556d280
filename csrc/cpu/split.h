#pragma once

#include "../core/schedule.h"

// How the backward pass is cut into tasks. One task computes a rectangle of a KV head's scores: some of the query heads
// that share it, against one chunk of keys. dQ then comes in one partial sum per chunk, dK and dV in one per share of
// the heads, and the partials are added in a fixed order. Where those of all heads would take too much memory, the
// heads come one after the other, in passes. The cut depends on shapes alone, so that gradients keep their bits for
// every number of threads; recomputing the scores in two passes instead costs 1.4 to 1.6 times as much.

namespace fae::cpu {

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

// Where the rows, or keys, of a (batch, KV head) begin among those of all pairs. In whole blocks, of which a packed
// sequence has at most one more than it needs, however long others are.
struct PairRows {
  GridSchedule blocks;
  int64_t heads_kv, block_rows;

  FAE_INLINE PairRows(const Problem& p, int64_t longest, int64_t block_rows_, const int32_t* cu_seqlens, int64_t total)
      : blocks(p.batch, 1, longest, block_rows_, cu_seqlens, total), heads_kv(p.heads_kv), block_rows(block_rows_) {}
  FAE_INLINE int64_t operator[](int64_t pair) const {
    const int64_t batch = pair / heads_kv, head = pair % heads_kv, first = first_block(blocks, batch);
    if (head == 0) return first * heads_kv * block_rows;  // as after the last pair, where there is no sequence
    return (first * heads_kv + head * (first_block(blocks, batch + 1) - first)) * block_rows;
  }
  FAE_INLINE int64_t size(int64_t pair) const { return (*this)[pair + 1] - (*this)[pair]; }
};

struct BackwardSplit {
  int64_t group;          // query heads per KV head
  int64_t heads_at_once;  // of which partial sums exist at one time: others come in a pass of their own
  int64_t head_splits;    // tasks that share those
  int64_t chunk_keys, chunks;
  int64_t pairs;        // (batch, KV head) in all
  PairRows rows, keys;  // of partial sums
  int64_t block_keys, dq_row, dkv_row, round_bytes;

  // `partial_rows`: rows and keys of partial sums are multiples of it. `block_keys`: keys that a task holds packed at
  // once; chunks are multiples of it. `dq_row`, `dkv_row`: bytes of a partial sum per query row and per key.
  FAE_INLINE BackwardSplit(const Problem& p, const LongestSequence& longest, int64_t partial_rows, int64_t block_keys_,
                           int64_t dq_row_, int64_t dkv_row_, int threads)
      : group(p.heads_kv > 0 ? p.heads / p.heads_kv : 0),
        pairs(p.batch * p.heads_kv),
        rows(p, longest.q, partial_rows, p.cu_seqlens_q, p.total_q),
        keys(p, longest.k, partial_rows, p.cu_seqlens_k, p.total_k),
        block_keys(block_keys_),
        dq_row(dq_row_),
        dkv_row(dkv_row_) {
    constexpr int64_t kTasks = 16, kMinChunk = 256;
    constexpr int64_t kPartialBytes = int64_t{40} << 20, kPartialBytesPerThread = int64_t{8} << 20;
    // Partial sums of packed sequences have room for all of their rows, used or not.
    Problem whole = p;
    if (p.cu_seqlens_q) whole.seqused_q = whole.seqused_k = nullptr;
    const LongestSequence largest(whole);
    const int64_t dq_bytes = largest.q * dq_row, dkv_bytes = largest.k * dkv_row;
    const int64_t wanted = pairs > 0 ? ceil_div(kTasks, pairs) : 1;
    heads_at_once = group > 0 ? group : 1;
    head_splits = least(wanted, heads_at_once);
    chunks = ceil_div(wanted, head_splits);
    const bool one_chunk_keeps_dq = longest.k <= block_keys;
    if ((one_chunk_keeps_dq ? 0 : group * dq_bytes) + shared_dkv_bytes(dkv_bytes) > kPartialBytes) {
      // A head in a chunk takes less memory than one more sum of dK and dV.
      heads_at_once = head_splits = 1;
      chunks = wanted;
    }
    const int64_t limit = (kPartialBytes - shared_dkv_bytes(dkv_bytes)) / (heads_at_once * dq_bytes + 1);
    chunks = least(chunks, limit < 1 ? 1 : limit);
    chunk_keys = round_up(ceil_div(longest.k > 0 ? longest.k : 1, chunks), kMinChunk);
    if (chunk_keys > block_keys) chunk_keys = round_up(chunk_keys, block_keys);
    chunks = longest.k > 0 ? ceil_div(longest.k, chunk_keys) : 1;
    round_bytes = kPartialBytes + threads * kPartialBytesPerThread;
  }

  // Pairs come in rounds, of which partial sums exist at one time: [first, round_end(first)), one pair at least.
  FAE_INLINE int64_t round_end(int64_t first) const {
    int64_t end = first + 1;
    for (int64_t above = pairs + 1; above - end > 1;) {
      const int64_t middle = (end + above) / 2;
      const int64_t dq_bytes = (rows[middle] - rows[first]) * dq_row;
      const int64_t dkv_bytes = (keys[middle] - keys[first]) * dkv_row;
      (chunks * heads_at_once * dq_bytes + shared_dkv_bytes(dkv_bytes) <= round_bytes ? end : above) = middle;
    }
    return end;
  }

  FAE_INLINE int64_t tasks_per_pair() const { return head_splits * chunks; }
  FAE_INLINE int64_t passes() const { return group > heads_at_once ? ceil_div(group, heads_at_once) : 1; }
  // Whether dQ of a row comes in several parts, and dK and dV of a key.
  FAE_INLINE bool shares_dq() const { return chunks > 1 || chunk_keys > block_keys; }
  FAE_INLINE bool shares_dkv() const { return head_splits > 1 || heads_at_once < group; }

  // Tasks per sequence that add partial sums up, each every so many blocks of rows or keys: more than one only where
  // there are few sequences, because each is a task however short its sequence is.
  static FAE_INLINE int64_t shares_of_sums(int64_t sequences) {
    constexpr int64_t kTasks = 128;
    return sequences > 0 ? ceil_div(kTasks, sequences) : 1;
  }

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

}  // namespace fae::cpu
