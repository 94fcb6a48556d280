#pragma once

#include "../core/backend.h"
#include "../core/schedule.h"
#include "recompute.h"

// dbias = dS summed over the dimensions that bias broadcasts, in a pass of its own: each task owns a tile of dbias and
// visits all scores that fall into it, so that sums have a fixed order and nothing of size S x S exists besides dbias.
// That recomputes S and dP, two products of seven; only calls whose bias wants a gradient pay.

namespace fae::cpu::FAE_LEVEL {

template <class T>
class BiasGradient {
 public:
  static constexpr int64_t kRows = 96, kCols = 256;  // of a tile of dbias

  struct Scratch {
    T *q, *dout, *k_transposed, *v_transposed, *prob, *ds;
    double* sum;  // a bias that broadcasts everywhere adds up all scores: float would lose digits
    size_t bytes;
    Scratch(const Problem& p, void* base) {
      Arena arena(base);
      q = arena.take<T>(kStripRows * padded<T>(p.head_dim));
      dout = arena.take<T>(kStripRows * padded<T>(p.head_dim_v));
      k_transposed = arena.take<T>(p.head_dim * kBlockKeys);
      v_transposed = arena.take<T>(p.head_dim_v * kBlockKeys);
      prob = arena.take<T>(kStripRows * kBlockKeys);
      ds = arena.take<T>(kStripRows * kBlockKeys);
      sum = arena.take<double>(kRows * kCols);
      bytes = arena.used();
    }
  };

  explicit BiasGradient(const BackwardProblem& p)
      : p_(p), row_tiles_(ceil_div(p.dbias.size_row, kRows)), col_tiles_(ceil_div(p.dbias.size_col, kCols)) {}

  int64_t tasks() const { return p_.dbias.size_batch * p_.dbias.size_head * row_tiles_ * col_tiles_; }

  void run(int64_t task, const Scratch& scratch) const {
    const ScoreView& view = p_.dbias;
    const int64_t col = task % col_tiles_ * kCols, row = task / col_tiles_ % row_tiles_ * kRows;
    const int64_t head = task / col_tiles_ / row_tiles_ % view.size_head;
    const int64_t batch = task / col_tiles_ / row_tiles_ / view.size_head;
    for (int64_t i = 0; i < kRows * kCols; ++i) scratch.sum[i] = 0;
    // A broadcast dimension has one index, which stands for all batches, heads, rows or columns.
    const Interval batches = view.size_batch == 1 ? Interval{0, p_.batch} : Interval{batch, batch + 1};
    const Interval heads = view.size_head == 1 ? Interval{0, p_.heads} : Interval{head, head + 1};
    for (int64_t b = batches.begin; b < batches.end; ++b)
      for (int64_t h = heads.begin; h < heads.end; ++h) add_scores(b, h, row, col, scratch);
    write(batch, head, row, col, scratch.sum);
  }

 private:
  void add_scores(int64_t b, int64_t head, int64_t tile_row, int64_t tile_col, const Scratch& scratch) const {
    const Recompute<T> recompute(p_, b, head);
    const Sequence& s = recompute.sequence();
    const bool every_row = p_.dbias.size_row == 1, every_col = p_.dbias.size_col == 1;
    const int64_t row_end = every_row ? s.seqlen_q : clamp_length(tile_row + kRows, s.seqlen_q);
    const int64_t col_end = every_col ? s.seqlen_k : clamp_length(tile_col + kCols, s.seqlen_k);
    const Interval seen = recompute.band().any(tile_row, row_end);
    for (int64_t key = tile_col; key < col_end; key += kBlockKeys) {
      if (key >= seen.end || key + kBlockKeys <= seen.begin) continue;
      const int64_t count = col_end - key < kBlockKeys ? col_end - key : kBlockKeys;
      const int64_t head_kv = head / (p_.heads / p_.heads_kv);
      pack_transposed<T>(Rows(p_.dtype, p_.k, b, s.k_start + key, head_kv), count, p_.head_dim,
                         static_cast<T>(p_.softmax_scale), scratch.k_transposed, kBlockKeys);
      pack_transposed<T>(Rows(p_.dtype, p_.v, b, s.k_start + key, head_kv), count, p_.head_dim_v, T(1),
                         scratch.v_transposed, kBlockKeys);
      for (int64_t row = tile_row; row < row_end; row += kStripRows) {
        const int64_t rows = row_end - row < kStripRows ? row_end - row : kStripRows;
        const Interval any = recompute.band().any(row, row + rows);
        if (key >= any.end || key + kBlockKeys <= any.begin) continue;
        pack_rows<T>(Rows(p_.dtype, p_.q, b, s.q_start + row, head), rows, p_.head_dim, T(1), scratch.q);
        pack_rows<T>(Rows(p_.dtype, p_.dout, b, s.q_start + row, head), rows, p_.head_dim_v, T(1), scratch.dout);
        recompute({scratch.q, scratch.dout, scratch.k_transposed, scratch.v_transposed}, row, rows, key, scratch.prob,
                  scratch.ds, nullptr);
        for (int64_t i = 0; i < rows; ++i) {
          double* sum = scratch.sum + (every_row ? 0 : row + i - tile_row) * kCols + (every_col ? 0 : key - tile_col);
          const T* ds = scratch.ds + i * kBlockKeys;
          for (int64_t j = 0; j < count; ++j) sum[every_col ? 0 : j] += ds[j];
        }
      }
    }
  }

  void write(int64_t batch, int64_t head, int64_t row, int64_t col, const double* sum) const {
    const ScoreView& view = p_.dbias;
    const int64_t rows = view.size_row - row < kRows ? view.size_row - row : kRows;
    const int64_t cols = view.size_col - col < kCols ? view.size_col - col : kCols;
    const auto store = [&](auto storage) {
      using S = decltype(storage);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
          static_cast<S*>(view.data)[score_offset(view, batch, head, row + i, col + j)] =
              to_storage<S>(static_cast<T>(sum[i * kCols + j]));
    };
    switch (view.dtype) {
      case DType::float64:
        return store(double{});
      case DType::float32:
        return store(float{});
      case DType::bfloat16:
        return store(bfloat16{});
      case DType::float16:
        return store(float16{});
    }
  }

  const BackwardProblem& p_;
  const int64_t row_tiles_, col_tiles_;
};

// `memory` holds BiasGradient<T>::Scratch for every worker.
template <class T>
void compute_dbias(const BackwardProblem& p, const Execution& execution, char* memory) {
  const BiasGradient<T> gradient(p);
  const size_t bytes = typename BiasGradient<T>::Scratch(p, nullptr).bytes;
  execution.parallel(gradient.tasks(), [&](int64_t task, int worker) {
    gradient.run(task, typename BiasGradient<T>::Scratch(p, memory + worker * bytes));
  });
}

}  // namespace fae::cpu::FAE_LEVEL
