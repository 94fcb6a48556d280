#pragma once

#include "problem.h"

// A mask is data about intervals: row i sees the keys [lo(i), hi(i)), and both ends never decrease with i.
// Causal order, sliding windows and sequence lengths are all bands; loop bounds, edge tiles and element masks of every
// kernel, forward and backward, come from here.

namespace fae {

// Int is int64_t, or int on GPUs, whose registers have 32 bits.
template <class Int>
struct BasicInterval {
  Int begin = 0, end = 0;  // empty unless begin < end
  FAE_INLINE bool empty() const { return begin >= end; }
  FAE_INLINE Int size() const { return empty() ? 0 : end - begin; }
};

template <class Int>
struct BasicBand {
  using Interval = BasicInterval<Int>;

  Int seqlen_q = 0, seqlen_k = 0;
  Int first = 0, last = 0;  // row i sees i + first <= j <= i + last, cut to [0, seqlen_k)

  BasicBand() = default;
  // The diagonal is aligned to the bottom right: the last row sees the last key. Beyond the sequences' lengths, the
  // window's sides make no difference.
  FAE_INLINE BasicBand(int64_t seqlen_q_, int64_t seqlen_k_, int64_t window_left, int64_t window_right)
      : seqlen_q(static_cast<Int>(seqlen_q_)), seqlen_k(static_cast<Int>(seqlen_k_)) {
    const int64_t shift = seqlen_k_ - seqlen_q_, limit = seqlen_q_ + seqlen_k_ + 1;
    first = static_cast<Int>(clamp_length(shift - window_left + limit, 2 * limit) - limit);
    last = static_cast<Int>(clamp_length(shift + window_right + limit, 2 * limit) - limit);
  }

  FAE_INLINE Int lo(Int i) const { return clamp_length(i + first, seqlen_k); }
  FAE_INLINE Int hi(Int i) const { return clamp_length(i + last + 1, seqlen_k); }
  FAE_INLINE bool contains(Int i, Int j) const { return j >= lo(i) && j < hi(i); }

  // Keys that any row of [i0, i1) sees, as one interval, and keys that every row of it sees.
  FAE_INLINE Interval any(Int i0, Int i1) const {
    if (i0 >= i1 || first > last) return {};
    return {lo(i0), hi(i1 - 1)};
  }
  FAE_INLINE Interval every(Int i0, Int i1) const {
    if (i0 >= i1 || first > last) return {};
    return {lo(i1 - 1), hi(i0)};
  }

  // The same questions from the side of the keys [j0, j1): rows that see any of them, rows that see all of them.
  FAE_INLINE Interval rows_any(Int j0, Int j1) const {
    if (j0 >= j1 || first > last) return {};
    return {clamp_length(j0 - last, seqlen_q), clamp_length(j1 - first, seqlen_q)};
  }
  FAE_INLINE Interval rows_every(Int j0, Int j1) const {
    if (j0 >= j1 || first > last || j1 > seqlen_k) return {};
    return {clamp_length(j1 - 1 - last, seqlen_q), clamp_length(j0 - first + 1, seqlen_q)};
  }
};

using Interval = BasicInterval<int64_t>;
using Band = BasicBand<int64_t>;

// What a sequence's rows see: the one place where a problem becomes a band.
template <class Int = int64_t>
FAE_INLINE BasicBand<Int> band_of(const Problem& p, const Sequence& s) {
  return BasicBand<Int>(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
}

}  // namespace fae
