#pragma once

#include "../core/backend.h"
#include "../core/schedule.h"
#include "../core/softmax.h"
#include "pack.h"
#include "split.h"

// What the backward pass needs once per query row, and the gradient of the sinks, which follows from it alone.

namespace fae::cpu::FAE_LEVEL {

// Memory for delta, laid out like lse.
template <class T>
StatsView take_delta(const Problem& p, Arena& arena) {
  const int64_t rows = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  StatsView view;
  view.data = arena.take<T>((p.cu_seqlens_q ? 1 : p.batch) * p.heads * rows);
  view.stride_batch = p.cu_seqlens_q ? 0 : p.heads * rows;
  view.stride_head = rows;
  return view;
}

// delta = rowsum(dout * out) - dlse
template <class T>
void compute_delta(const BackwardProblem& p, int64_t longest_q, const Execution& execution) {
  constexpr int64_t kRows = 256;
  constexpr int W = Vec<T>::width;
  const GridSchedule schedule(p.batch, p.heads, longest_q, kRows, p.cu_seqlens_q, p.total_q);
  execution.parallel(schedule.size(), [&](int64_t task, int) {
    const Tile tile = schedule[task];
    const Sequence s = sequence_of(p, tile.batch);
    const int64_t begin = tile.block * kRows, end = begin + kRows < s.seqlen_q ? begin + kRows : s.seqlen_q;
    for (int64_t row = begin; row < end; ++row) {
      const Rows out(p.dtype, p.out, tile.batch, s.q_start + row, tile.head);
      const Rows dout(p.dtype, p.dout, tile.batch, s.q_start + row, tile.head);
      Vec<T> products = T(0);
      with_storage<T>(p.dtype, [&](auto storage) {
        using S = decltype(storage);
        const S *x = static_cast<const S*>(out.data), *y = static_cast<const S*>(dout.data);
        int64_t d = 0;
        for (; d + W <= p.head_dim_v; d += W) products += load_as<T>(x + d) * load_as<T>(y + d);
        if (d < p.head_dim_v) products += load_as<T>(x + d, p.head_dim_v - d) * load_as<T>(y + d, p.head_dim_v - d);
      });
      T delta = sum(products);
      // A row that sees nothing has no gradient, whatever comes through its lse: -inf in what follows easily makes NaN.
      if (p.dlse.data)
        delta = *stats_ptr<T>(p.lse, tile.batch, s.q_start + row, tile.head) == minus_infinity<T>()
                    ? T(0)
                    : delta - *stats_ptr<T>(p.dlse, tile.batch, s.q_start + row, tile.head);
      *stats_ptr<T>(p.delta, tile.batch, s.q_start + row, tile.head) = delta;
    }
  });
}

// A sink is a key without a value: dsink = -sum over rows of P_sink * delta,  P_sink = exp(sink - lse).
template <class T>
void compute_dsinks(const BackwardProblem& p, const Execution& execution) {
  constexpr int W = Vec<T>::width;
  execution.parallel(p.heads, [&](int64_t head, int) {
    const T sink = static_cast<const T*>(p.sinks)[head];
    Vec<T> total = T(0);
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      for (int64_t row = 0; row < s.seqlen_q; row += W) {
        T lse[W], delta[W];
        for (int i = 0; i < W; ++i) {
          const bool inside = row + i < s.seqlen_q;
          lse[i] = inside ? finite_max(*stats_ptr<T>(p.lse, b, s.q_start + row + i, head)) : T(0);
          delta[i] = inside ? *stats_ptr<T>(p.delta, b, s.q_start + row + i, head) : T(0);
        }
        total += exp_of(sink - Vec<T>::load(lse)) * Vec<T>::load(delta);
      }
    }
    static_cast<T*>(p.dsinks)[head] = -sum(total);
  });
}

}  // namespace fae::cpu::FAE_LEVEL
