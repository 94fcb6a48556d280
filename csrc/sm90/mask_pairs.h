#pragma once

#include "../cuda/score_terms.h"
#include "ptx.h"

// The boolean mask for kernels made for it. Global memory takes as long as a product: what a lane's scores need of it
// is read while their product is under way, two neighbours of a row at a time.

namespace fae::sm90 {

// Reads pairs of the mask, where cuda::has_pairs says that it has them. What it does not have hides nothing.
class PairReader {
 public:
  // row, col: where the scores begin.
  __device__ __forceinline__ PairReader(const ScoreView& mask, int batch, int head, const cuda::DeviceBand& band,
                                        int row, int col)
      : mask_(static_cast<const uint8_t*>(mask.data) + score_offset(mask, batch, head, row, col)),
        stride_row_(mask.stride_row),
        rows_(cuda::extent_of(band.seqlen_q, mask.size_row) - row),
        cols_(cuda::extent_of(band.seqlen_k, mask.size_col) - col) {}

  __device__ __forceinline__ bool has_columns(int cols) const { return cols <= cols_; }
  // f(i) becomes the pair of a row at column col + 8 i, for i < N. kWhole: the mask has all columns of the scores.
  template <bool kWhole, int N, class F>
  __device__ __forceinline__ void read(int row, int col, F&& f) const {
    const uint8_t* const first = mask_ + row * stride_row_ + col;
#pragma unroll
    for (int i = 0; i < N; ++i) f(i) = row < rows_ ? read_pair<kWhole>(first + 8 * i, col + 8 * i) : kOutside;
  }

 private:
  static constexpr uint16_t kOutside = 0x0101;

  template <bool kWhole>
  __device__ __forceinline__ uint16_t read_pair(const uint8_t* p, int col) const {
    if (kWhole || col + 1 < cols_) return *reinterpret_cast<const uint16_t*>(p);
    if (col >= cols_) return kOutside;
    return static_cast<uint16_t>(*p | (kOutside & 0xff00));
  }

  const uint8_t* const mask_;
  const int64_t stride_row_;
  const int rows_, cols_;
};

// Of 16 rows by 8 N columns, as an accumulator has them.
template <int N>
class MaskPairs {
 public:
  __device__ __forceinline__ void load(const ScoreView& mask, int batch, int head, const cuda::DeviceBand& band,
                                       int row, int col) {
    const PairReader reader(mask, batch, head, band, row, col);
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
  __device__ __forceinline__ bool hides(int half, int n, int e) const {
    return static_cast<uint8_t>(words_[half][n] >> 8 * e) == 0;
  }

 private:
  uint16_t words_[2][N];
};

// Of 8 M rows by 16 columns, as the transpose of an accumulator has them. In memory, neighbours lie in rows; a lane
// needs those of columns, which matrices of 8 x 8 bring when they are transposed on the way.
template <int M>
class TransposedMaskPairs {
 public:
  __device__ __forceinline__ void load(const ScoreView& mask, int batch, int head, const cuda::DeviceBand& band,
                                       int row, int col) {
    const PairReader reader(mask, batch, head, band, row, col);
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
        x = transpose_matrix((x & 0xff) | (x & 0xff00) << 8);
      }
  }
  __device__ __forceinline__ bool hides(int m, int half, int e) const {
    return static_cast<uint16_t>(words_[m][e] >> 16 * half) == 0;
  }

 private:
  uint32_t words_[M][2];  // (m, e)
};

}  // namespace fae::sm90
