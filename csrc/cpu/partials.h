#pragma once

#include "pack.h"
#include "split.h"

// Memory for the partial sums of a backward pass.

namespace fae::cpu::FAE_LEVEL {

// Those of one round: dQ [pair][chunk][head of the pass][row][dim], on matrix tiles every 32 rows transposed, dK and dV
// [pair][share][key][dim]. Absent where a task finishes its gradients alone.
template <class T>
struct Partials {
  T *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t ld_qk, ld_v;
  size_t bytes;

  Partials(const BackwardSplit& split, int64_t ld_qk_, int64_t ld_v_, void* base) : ld_qk(ld_qk_), ld_v(ld_v_) {
    int64_t rows = 0, keys = 0;
    for (int64_t first = 0, last; first < split.pairs; first = last) {
      last = split.round_end(first);
      const int64_t round_rows = split.rows[last] - split.rows[first],
                    round_keys = split.keys[last] - split.keys[first];
      rows = round_rows > rows ? round_rows : rows;
      keys = round_keys > keys ? round_keys : keys;
    }
    Arena arena(base);
    if (split.shares_dq()) dq = arena.take<T>(rows * split.chunks * split.heads_at_once * ld_qk);
    if (split.shares_dkv()) {
      dk = arena.take<T>(keys * split.head_splits * ld_qk);
      dv = arena.take<T>(keys * split.head_splits * ld_v);
    }
    bytes = arena.used();
  }
};

// Those of one pair of the round that begins with the pair `first`.
template <class T>
struct PairPartials {
  T *dq = nullptr, *dk = nullptr, *dv = nullptr;
  int64_t rows, keys;

  PairPartials(const Partials<T>& partials, const BackwardSplit& split, int64_t first, int64_t pair)
      : rows(split.rows.size(pair)), keys(split.keys.size(pair)) {
    const int64_t row = split.rows[pair] - split.rows[first], key = split.keys[pair] - split.keys[first];
    if (partials.dq) dq = partials.dq + row * split.chunks * split.heads_at_once * partials.ld_qk;
    if (!partials.dk) return;
    dk = partials.dk + key * split.head_splits * partials.ld_qk;
    dv = partials.dv + key * split.head_splits * partials.ld_v;
  }
};

}  // namespace fae::cpu::FAE_LEVEL
