#pragma once

#include <type_traits>

#include "../core/problem.h"
#include "../cuda/accumulator.h"
#include "../cuda/swizzle.h"
#include "ptx.h"

// Matrix tiles on their way from global memory to the tensor cores: loads into shared memory, fragments in registers,
// and the product of a warp. In bytes, 16-bit types and float move alike: an instruction takes 16 rows of 32 bytes.

namespace fae::sm80 {

using cuda::Accumulator;
using cuda::lane_index;
using cuda::SharedTile;
using cuda::warp_index;

// Columns of A, rows of B, that one product step consumes: 32 bytes.
template <class T>
constexpr int kStepDepth = 32 / sizeof(T);

// Whether a float product takes the three tf32 products that give float accuracy, or one.
enum class Precision { full, tf32 };

inline Precision precision_of(const Problem& p) { return p.allow_tf32 ? Precision::tf32 : Precision::full; }

// ---- Fragments -----------------------------------------------------------------------------------------------------

template <class T>
struct FragmentA {
  uint32_t x[4];
  __device__ __forceinline__ FragmentA() = default;
  __device__ __forceinline__ FragmentA(uint32_t a, uint32_t b, uint32_t c, uint32_t d) : x{a, b, c, d} {}
};
template <class T>
struct FragmentB {
  uint32_t x[2];
  __device__ __forceinline__ FragmentB(uint32_t a, uint32_t b) : x{a, b} {}
};

// A float is the sum of two tf32 numbers up to 2^-22 of it.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = round_to_tf32(__uint_as_float(x));
  low = round_to_tf32(__uint_as_float(x) - __uint_as_float(high));
}

template <>
struct FragmentA<float> {
  uint32_t high[4], low[4];
  __device__ __forceinline__ FragmentA() = default;
  __device__ __forceinline__ FragmentA(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    split_tf32(a, high[0], low[0]);
    split_tf32(b, high[1], low[1]);
    split_tf32(c, high[2], low[2]);
    split_tf32(d, high[3], low[3]);
  }
};
template <>
struct FragmentB<float> {
  uint32_t high[2], low[2];
  __device__ __forceinline__ FragmentB(uint32_t a, uint32_t b) {
    split_tf32(a, high[0], low[0]);
    split_tf32(b, high[1], low[1]);
  }
};

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b, Precision) {
  mma(d, a.x, b.x, T{});
}
template <>
__device__ __forceinline__ void multiply_add(float (&d)[4], const FragmentA<float>& a, const FragmentB<float>& b,
                                             Precision precision) {
  if (precision == Precision::full) {  // small terms first
    mma(d, a.low, b.high, float{});
    mma(d, a.high, b.low, float{});
  }
  mma(d, a.high, b.high, float{});
}

// Two neighbouring elements of an accumulator in one register of a 16-bit fragment.
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// Step k of an accumulator as the left operand of the next product. A float fragment wants columns t and t + 4 of eight
// where the accumulator has 2t and 2t + 1: the right operand takes its rows in that order (RowOrder::pairs).
template <class T, int M, int N>
__device__ __forceinline__ FragmentA<T> as_left_operand(const Accumulator<M, N>& s, int m, int k) {
  if constexpr (std::is_same_v<T, float>) {
    const auto& x = s.x[m][k];
    return {__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]), __float_as_uint(x[3])};
  } else {
    const auto &x = s.x[m][2 * k], &y = s.x[m][2 * k + 1];
    return {pack(x[0], x[1], T{}), pack(x[2], x[3], T{}), pack(y[0], y[1], T{}), pack(y[2], y[3], T{})};
  }
}

// ---- Operands in shared memory -------------------------------------------------------------------------------------

enum class RowOrder { natural, pairs };

// Rows of a tile, from row0 on, as an operand that is stored as the product reads it: a left operand [m][k] or a right
// operand [n][k].
template <class Tile>
class StraightOperand {
 public:
  using T = typename Tile::Element;

  __device__ __forceinline__ StraightOperand(const Tile& tile, int row0)
      : lane_(tile.address(row0 + lane_index() % 16, 0) ^ (lane_index() / 16 * 16)) {}

  __device__ __forceinline__ FragmentA<T> left(int m, int k) const {
    uint32_t x[4];
    load(m, k, x);
    return {x[0], x[1], x[2], x[3]};
  }
  // Columns 16 pair .. 16 pair + 15 of the product, eight by eight.
  template <class F>
  __device__ __forceinline__ void right(int pair, int k, F&& use) const {
    uint32_t x[4];
    load(pair, k, x);
    use(FragmentB<T>(x[0], x[2]), FragmentB<T>(x[1], x[3]));
  }

 private:
  // 16 rows by 32 bytes. How a row's chunks are permuted depends on the lane alone, so that a step along the row is an
  // exclusive or within 128 bytes.
  __device__ __forceinline__ void load(int rows, int step, uint32_t (&x)[4]) const {
    load_matrices(
        (lane_ ^ (step % 4 * 32)) + step / 4 * Tile::kRows * cuda::kSwizzleBytes + rows * 16 * cuda::kSwizzleBytes, x);
  }

  uint32_t lane_;
};

// kPieces x 16 columns of a tile, from col0 on (a multiple of their number), as an operand that is stored the other way
// round: a left operand [k][m] or a right operand [k][n].
template <class Tile, int kPieces, RowOrder kOrder = RowOrder::natural>
class TransposedOperand {
 public:
  using T = typename Tile::Element;

  __device__ __forceinline__ explicit TransposedOperand(const Tile& tile, int col0 = 0)
      : first_(kAligned ? 0 : col0 / 16) {
    const int col = kAligned ? col0 : 0;
    if constexpr (kWide) {
      const int t = lane_index() % 4, column = col + lane_index() / 4;
      const bool pairs = kOrder == RowOrder::pairs;
      lane_[0] = tile.address(pairs ? 2 * t : t, column);
      lane_[1] = tile.address(pairs ? 2 * t + 1 : t + 4, column);
    } else {
      lane_[0] = tile.address(lane_index() % 16, col) ^ (lane_index() / 16 * 16);
    }
  }

  __device__ __forceinline__ FragmentA<T> left(int m, int k) const {
    uint32_t x[4];
    load(k, m, x);
    return {x[0], x[2], x[1], x[3]};
  }
  template <class F>
  __device__ __forceinline__ void right(int pair, int k, F&& use) const {
    uint32_t x[4];
    load(k, pair, x);
    use(FragmentB<T>(x[0], x[1]), FragmentB<T>(x[2], x[3]));
  }

 private:
  static constexpr bool kWide = sizeof(T) == 4;  // ldmatrix transposes 16-bit elements only
  // Pieces fill 128 bytes or divide them: a step along the row is an exclusive or with what the lane has.
  static constexpr bool kAligned = (kPieces & (kPieces - 1)) == 0;

  // kStepDepth rows by 16 columns.
  __device__ __forceinline__ void load(int step, int columns, uint32_t (&x)[4]) const {
    columns += first_;
    if constexpr (kWide) {
      const uint32_t offset = step * 8 * cuda::kSwizzleBytes + columns / 2 * Tile::kRows * cuda::kSwizzleBytes;
      const uint32_t chunk = columns % 2 * 64;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load_shared((lane_[i % 2] ^ (chunk + i / 2 * 32)) + offset);
    } else {
      load_matrices_transposed((lane_[0] ^ (columns % 4 * 32)) + columns / 4 * Tile::kRows * cuda::kSwizzleBytes +
                                   step * 16 * cuda::kSwizzleBytes,
                               x);
    }
  }

  uint32_t lane_[kWide ? 2 : 1];
  int first_;
};

// Where a warp's pairs of neighbouring elements go, of an accumulator with kPieces x 8 columns whose first element belongs
// to (row0, col0) of a tile; col0 is a multiple of the columns, row0 one of 8.
template <class Tile, int kPieces>
class PairStore {
  using T = typename Tile::Element;
  static constexpr int kPieceBytes = 8 * sizeof(T);
  static_assert((kPieces & (kPieces - 1)) == 0);

 public:
  __device__ __forceinline__ PairStore(const Tile& tile, int row0, int col0)
      : lane_(tile.address(row0 + lane_index() / 4, col0 + lane_index() % 4 * 2)) {}

  // The pair of columns piece n, in the eight rows number `rows`.
  __device__ __forceinline__ void store(int rows, int n, float x, float y) const {
    const int byte = n * kPieceBytes;
    const uint32_t address = (lane_ ^ (byte % cuda::kSwizzleBytes)) +
                             (byte / cuda::kSwizzleBytes * Tile::kRows + rows * 8) * cuda::kSwizzleBytes;
    if constexpr (std::is_same_v<T, float>) {
      store_shared(address, __float_as_uint(x));
      store_shared(address + 4, __float_as_uint(y));
    } else {
      store_shared(address, pack(x, y, T{}));
    }
  }

 private:
  uint32_t lane_;
};

// ---- Products ------------------------------------------------------------------------------------------------------

// c += A B over kSteps steps, for the 16 M x 8 N elements of one warp. left(m, k) gives a fragment of A; `right` is an
// operand.
template <int kSteps, int M, int N, class Left, class Right>
__device__ __forceinline__ void multiply(Accumulator<M, N>& c, Left&& left, const Right& right, Precision precision) {
  using T = typename Right::T;
  static_assert(N % 2 == 0);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    FragmentA<T> a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = left(m, k);
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair)
      right.right(pair, k, [&](const FragmentB<T>& b0, const FragmentB<T>& b1) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply_add<T>(c.x[m][2 * pair], a[m], b0, precision);
          multiply_add<T>(c.x[m][2 * pair + 1], a[m], b1, precision);
        }
      });
  }
}

// ---- Shared memory and global memory -------------------------------------------------------------------------------

// Rows of one head in global memory, from some row and column on. What lies outside reads as zero.
template <class T>
struct GlobalRows {
  const T* data;
  int64_t stride;
  int rows, cols;
  bool whole_vectors;  // data and stride are multiples of 16 bytes

  __device__ __forceinline__ GlobalRows(const TensorView& view, int64_t batch, int64_t row, int64_t head, int rows_,
                                        int64_t head_dim, int first_col, bool whole_vectors_)
      : data(row_ptr<const T>(view, batch, row, head) + first_col),
        stride(view.stride_row),
        rows(rows_),
        cols(static_cast<int>(head_dim) - first_col),
        whole_vectors(whole_vectors_) {}
};

// Copies a tile by all threads of the block: starts it, or, where rows are not aligned for that, does it at once.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows(const Tile& tile, const GlobalRows<typename Tile::Element>& source) {
  using T = typename Tile::Element;
  constexpr int kLine = cuda::kSwizzleBytes / sizeof(T), kChunk = 16 / sizeof(T), kStep = kThreads / 8;
  const int first = threadIdx.x / 8, lane_col = threadIdx.x % 8 * kChunk;
  if (!source.whole_vectors) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kBlocks * 8; i += kThreads) {
      const int row = i / 8 % Tile::kRows, col = i / 8 / Tile::kRows * kLine + lane_col;
      const T* const from = source.data + row * source.stride + col;
      T chunk[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) chunk[j] = row < source.rows && col + j < source.cols ? from[j] : T(0.0f);
      uint4 bytes;
      memcpy(&bytes, chunk, 16);
      store_shared_16_bytes(tile.address(row, col), bytes);
    }
    return;
  }
  const int64_t step = kStep * source.stride;
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block) {
    const int col = block * kLine + lane_col, valid_cols = clamp_length(source.cols - col, kChunk);
    const T* from = source.data + first * source.stride + col;
#pragma unroll
    for (int i = 0; i < (Tile::kRows + kStep - 1) / kStep; ++i, from += step) {
      const int row = first + i * kStep, valid = row < source.rows ? valid_cols : 0;
      if (Tile::kRows % kStep != 0 && row >= Tile::kRows) break;
      copy_16_bytes(tile.address(row, col), valid > 0 ? from : source.data, valid * static_cast<int>(sizeof(T)));
    }
  }
}

// Whether rows of a tensor can be copied 16 bytes at a time.
template <class T>
bool whole_vectors(const TensorView& t) {
  const auto whole = [](int64_t elements) { return elements * sizeof(T) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && whole(t.stride_batch) && whole(t.stride_row) &&
         whole(t.stride_head);
}

// Two neighbouring elements of a row, from registers to a tile.
template <class Tile>
__device__ __forceinline__ void store_pair(const Tile& tile, int row, int col, float x, float y) {
  using T = typename Tile::Element;
  const uint32_t address = tile.address(row, col);
  if constexpr (std::is_same_v<T, float>) {
    store_shared(address, __float_as_uint(x));
    store_shared(address + 4, __float_as_uint(y));
  } else {
    store_shared(address, pack(x, y, T{}));
  }
}

// The same to a row in global memory with `cols` columns.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int col, int cols, float x, float y) {
  if (col < cols) row[col] = T(x);
  if (col + 1 < cols) row[col + 1] = T(y);
}

// 16 bytes to global memory, or the first `count` elements of them.
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const uint4& bytes, int count) {
  constexpr int kChunk = 16 / sizeof(T);
  if (count >= kChunk && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = bytes;
    return;
  }
  T elements[kChunk];
  memcpy(static_cast<void*>(elements), &bytes, 16);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) to[i] = elements[i];
}

}  // namespace fae::sm80
