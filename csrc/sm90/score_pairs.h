#pragma once

#include "../cuda/score_terms.h"
#include "ptx.h"

// Bias and mask for kernels made for one of them. Global memory takes as long as a product: what a lane's scores need
// of such a matrix is read while their product is under way, two neighbours of a row at a time.

namespace fae::sm90 {

// Reads pairs of a matrix over the scores, where cuda::has_pairs says that it has them.
template <class E>
class PairReader {
  static_assert(sizeof(E) <= 2);

 public:
  using Word = std::conditional_t<sizeof(E) == 2, uint32_t, uint16_t>;

  // row, col: where the scores begin. outside: the pair that stands for what the matrix does not have.
  __device__ __forceinline__ PairReader(const ScoreView& view, int batch, int head, const cuda::DeviceBand& band,
                                        int row, int col, Word outside)
      : matrix_(static_cast<const E*>(view.data) + score_offset(view, batch, head, row, col)),
        stride_row_(view.stride_row),
        rows_(cuda::extent_of(band.seqlen_q, view.size_row) - row),
        cols_(cuda::extent_of(band.seqlen_k, view.size_col) - col),
        outside_(outside) {}

  __device__ __forceinline__ bool has_columns(int cols) const { return cols <= cols_; }
  // f(i) becomes the pair of a row at column col + 8 i, for i < N. kWhole: the matrix has all columns of the scores.
  template <bool kWhole, int N, class F>
  __device__ __forceinline__ void read(int row, int col, F&& f) const {
    const E* const first = matrix_ + row * stride_row_ + col;
#pragma unroll
    for (int i = 0; i < N; ++i) f(i) = row < rows_ ? read_pair<kWhole>(first + 8 * i, col + 8 * i) : outside_;
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ Word read_pair(const E* p, int col) const {
    if (kWhole || col + 1 < cols_) return *reinterpret_cast<const Word*>(p);
    if (col >= cols_) return outside_;
    constexpr int kBits = 8 * sizeof(E);
    std::conditional_t<sizeof(E) == 2, uint16_t, uint8_t> first;
    memcpy(&first, p, sizeof(first));
    return static_cast<Word>(first | outside_ >> kBits << kBits);
  }

  const E* const matrix_;
  const int64_t stride_row_;
  const int rows_, cols_;
  const Word outside_;
};

// What is not there adds nothing, and hides nothing.
template <class E>
constexpr auto kOutside = static_cast<typename PairReader<E>::Word>(sizeof(E) == 2 ? 0 : 0x0101);

// Of 16 rows by 8 N columns, as an accumulator has them.
template <class E, int N>
class ScorePairs {
  using Reader = PairReader<E>;

 public:
  __device__ __forceinline__ void load(const ScoreView& view, int batch, int head, const cuda::DeviceBand& band,
                                       int row, int col) {
    const Reader reader(view, batch, head, band, row, col, kOutside<E>);
    const int lane = opaque(lane_index());  // addresses must not take registers from the loops
    const auto load_all = [&](auto whole) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        reader.template read<decltype(whole)::value, N>(8 * half + lane / 4, lane % 4 * 2,
                                                        [&](int n) -> auto& { return words_[half][n]; });
    };
    if (reader.has_columns(8 * N))
      load_all(std::true_type{});
    else
      load_all(std::false_type{});
  }
  __device__ __forceinline__ E at(int half, int n, int e) const {
    E pair[2];
    memcpy(static_cast<void*>(pair), &words_[half][n], sizeof(pair));
    return pair[e];
  }

 private:
  typename Reader::Word words_[2][N];
};

// Of 8 M rows by 16 columns, as the transpose of an accumulator has them. In memory, neighbours lie in rows; a lane
// needs those of columns, which matrices of 8 x 8 bring when they are transposed on the way.
template <class E, int M>
class TransposedScorePairs {
  using Reader = PairReader<E>;

 public:
  __device__ __forceinline__ void load(const ScoreView& view, int batch, int head, const cuda::DeviceBand& band,
                                       int row, int col) {
    const Reader reader(view, batch, head, band, row, col, kOutside<E>);
    const int lane = opaque(lane_index());
    const auto load_all = [&](auto whole) {
#pragma unroll
      for (int m = 0; m < M; ++m)
        reader.template read<decltype(whole)::value, 2>(8 * m + lane / 4, lane % 4 * 2,
                                                        [&](int n) -> auto& { return words_[m][n]; });
    };
    if (reader.has_columns(16))
      load_all(std::true_type{});
    else
      load_all(std::false_type{});
  }
  // To be called by all lanes when what was loaded is needed.
  __device__ __forceinline__ void transpose() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t& x = words_[m][n];
        if (sizeof(E) == 1) x = (x & 0xff) | (x & 0xff00) << 8;
        x = transpose_matrix(x);
      }
  }
  __device__ __forceinline__ E at(int m, int half, int e) const {
    const auto x = static_cast<uint16_t>(words_[m][e] >> 16 * half);
    if constexpr (sizeof(E) == 1) return static_cast<E>(x);
    E element;
    memcpy(static_cast<void*>(&element), &x, sizeof(element));
    return element;
  }

 private:
  uint32_t words_[M][2];  // (m, e)
};

}  // namespace fae::sm90
