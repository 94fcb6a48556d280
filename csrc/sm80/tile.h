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
  FragmentA() = default;
  __device__ __forceinline__ FragmentA(uint32_t a, uint32_t b, uint32_t c, uint32_t d) : x{a, b, c, d} {}
};
template <class T>
struct FragmentB {
  uint32_t x[2];
  __device__ __forceinline__ FragmentB(uint32_t a, uint32_t b) : x{a, b} {}
};

// What a tensor core gets of the kSize registers of a fragment.
template <class T, Precision, int kSize>
struct Factor {
  uint32_t x[kSize];
  Factor() = default;
  __device__ __forceinline__ explicit Factor(const uint32_t (&fragment)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = fragment[i];
  }
};

// Of a float a tensor core ignores the last 13 bits.
constexpr uint32_t kIgnoredBits = 0x1fff, kHalfIgnored = 0x1000;

// A float is the sum of two tf32 numbers up to 2^-23 of it: the nearest one, and what the tensor core makes of the
// rest. What is infinite or NaN leaves NaN as the rest.
template <int kSize>
struct Factor<float, Precision::full, kSize> {
  uint32_t high[kSize], low[kSize];
  Factor() = default;
  __device__ __forceinline__ explicit Factor(const uint32_t (&fragment)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      high[i] = (fragment[i] + kHalfIgnored) & ~kIgnoredBits;
      low[i] = __float_as_uint(__uint_as_float(fragment[i]) - __uint_as_float(high[i]));
    }
  }
};
template <int kSize>
struct Factor<float, Precision::tf32, kSize> {
  uint32_t x[kSize];
  Factor() = default;
  __device__ __forceinline__ explicit Factor(const uint32_t (&fragment)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float value = __uint_as_float(fragment[i]);
      x[i] = value == value ? fragment[i] + kHalfIgnored : fragment[i];
    }
  }
};

template <class T, Precision kPrecision>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Factor<T, kPrecision, 4>& a,
                                             const Factor<T, kPrecision, 2>& b) {
  mma(d, a.x, b.x, T{});
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Factor<float, Precision::full, 4>& a,
                                             const Factor<float, Precision::full, 2>& b) {
  mma(d, a.low, b.high, float{});  // small terms first
  mma(d, a.high, b.low, float{});
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

enum class Side { left, right };
enum class RowOrder { natural, pairs };

// Which 8 x 8 matrix of a 16 x 16 piece a lane names the rows of, so that ldmatrix leaves them in the registers in the
// order that a product wants: with `down_first` the second one lies below the first, else beside it. (In any other
// order the compiler copies registers: operands of a product are consecutive ones.)
struct MatrixOrder {
  int row, chunk;
  __device__ __forceinline__ explicit MatrixOrder(bool down_first)
      : row(down_first ? lane_index() % 16 : lane_index() / 16 * 8 + lane_index() % 8),
        chunk(down_first ? lane_index() / 16 : lane_index() / 8 % 2) {}
};

// Rows of a tile, from row0 on, as an operand that is stored as the product reads it: a left operand [m][k] or a right
// operand [n][k].
template <class Tile, Side kSide>
class StraightOperand {
 public:
  using T = typename Tile::Element;

  __device__ __forceinline__ StraightOperand(const Tile& tile, int row0) {
    const MatrixOrder order(kSide == Side::left);
    lane_ = tile.address(row0 + order.row, 0) ^ (order.chunk * 16);
  }

  __device__ __forceinline__ FragmentA<T> left(int m, int k) const {
    static_assert(kSide == Side::left);
    uint32_t x[4];
    load(m, k, x);
    return {x[0], x[1], x[2], x[3]};
  }
  // Columns 16 pair .. 16 pair + 15 of the product, eight by eight.
  template <class F>
  __device__ __forceinline__ void right(int pair, int k, F&& use) const {
    static_assert(kSide == Side::right);
    uint32_t x[4];
    load(pair, k, x);
    use(FragmentB<T>(x[0], x[1]), FragmentB<T>(x[2], x[3]));
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
template <class Tile, Side kSide, int kPieces, RowOrder kOrder = RowOrder::natural>
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
      const MatrixOrder order(kSide == Side::right);
      lane_[0] = tile.address(order.row, col) ^ (order.chunk * 16);
    }
  }

  __device__ __forceinline__ FragmentA<T> left(int m, int k) const {
    static_assert(kSide == Side::left);
    uint32_t x[4];
    load(k, m, x);
    return {x[0], x[1], x[2], x[3]};
  }
  template <class F>
  __device__ __forceinline__ void right(int pair, int k, F&& use) const {
    static_assert(kSide == Side::right);
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
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int lower = kSide == Side::right ? i % 2 : i / 2, beside = kSide == Side::right ? i / 2 : i % 2;
        x[i] = load_shared((lane_[lower] ^ static_cast<uint32_t>(columns % 2 * 64 + beside * 32)) + offset);
      }
    } else {
      load_matrices_transposed((lane_[0] ^ (columns % 4 * 32)) + columns / 4 * Tile::kRows * cuda::kSwizzleBytes +
                                   step * 16 * cuda::kSwizzleBytes,
                               x);
    }
  }

  uint32_t lane_[kWide ? 2 : 1];
  int first_;
};

// Where a warp's pairs of neighbouring elements go, of an accumulator with kPieces x 8 columns whose first element
// belongs to (row0, col0) of a tile; col0 is a multiple of the columns, row0 one of 8.
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
// operand. Tensor cores cut sums off where float arithmetic rounds them: with float accuracy, products add up for two
// steps only, and an addition outside takes them to c. (One step has twice the additions, and errors no smaller.)
template <Precision kPrecision, int kSteps, int kUnroll, int M, int N, class Left, class Right>
__device__ __forceinline__ void multiply_in(Accumulator<M, N>& c, Left&& left, const Right& right) {
  using T = typename Right::T;
  constexpr bool kRounded = std::is_same_v<T, float> && kPrecision == Precision::full;
  constexpr int kTogether = kRounded ? 2 : 1;
  static_assert(N % 2 == 0 && kSteps % kTogether == 0);
#pragma unroll(kUnroll / kTogether)
  for (int k = 0; k < kSteps; k += kTogether) {
    Factor<T, kPrecision, 4> a[kTogether][M];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int m = 0; m < M; ++m) a[i][m] = Factor<T, kPrecision, 4>(left(m, k + i).x);
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      Accumulator<M, 2> sum;
      sum.fill(0);
      const auto into = [&](int m, int n) -> float (&)[4] { return kRounded ? sum.x[m][n] : c.x[m][2 * pair + n]; };
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        right.right(pair, k + i, [&](const FragmentB<T>& fragment0, const FragmentB<T>& fragment1) {
          const Factor<T, kPrecision, 2> b0(fragment0.x), b1(fragment1.x);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            multiply_add(into(m, 0), a[i][m], b0);
            multiply_add(into(m, 1), a[i][m], b1);
          }
        });
      if constexpr (kRounded)
        sum.for_each([&](int m, int half, int n, int e) { c.at(m, half, 2 * pair + n, e) += sum.at(m, half, n, e); });
    }
  }
}
template <int kSteps, int kUnroll = kSteps, int M, int N, class Left, class Right>
__device__ __forceinline__ void multiply(Accumulator<M, N>& c, Left&& left, const Right& right, Precision precision) {
  if (std::is_same_v<typename Right::T, float> && precision == Precision::tf32)
    multiply_in<Precision::tf32, kSteps, kUnroll>(c, left, right);
  else
    multiply_in<Precision::full, kSteps, kUnroll>(c, left, right);
}
// With both operands in shared memory. The code of float has two steps and walks through it: with all of them in a row
// the parts of their factors take more registers than there are.
template <int kSteps, int M, int N, class Left, class Right>
__device__ __forceinline__ void multiply_operands(Accumulator<M, N>& c, const Left& left, const Right& right,
                                                  Precision precision) {
  constexpr int kUnroll = std::is_same_v<typename Right::T, float> ? 2 : kSteps;
  multiply<kSteps, kUnroll>(c, [&](int m, int k) { return left.left(m, k); }, right, precision);
}

// ---- Shared memory and global memory -------------------------------------------------------------------------------

// Rows of one head in global memory, from some row and column on, as one thread copies them to a tile: the eight
// threads of a group copy 128 bytes of a row. What lies outside reads as zero. Rows are whole vectors of 16 bytes, from
// where those begin (Backend::takes_whole_vectors).
template <class T>
struct GlobalRows {
  static constexpr int kChunk = 16 / sizeof(T), kLine = cuda::kSwizzleBytes / sizeof(T);

  const T* data;  // the thread's first element
  int64_t stride;
  int rows, cols;  // that exist from there on

  // `rows_` and `cols_`: of the whole block from its first element on.
  __device__ __forceinline__ GlobalRows(const T* data_, int64_t stride_, int rows_, int64_t cols_)
      : data(data_),
        stride(stride_),
        rows(rows_ - static_cast<int>(threadIdx.x / 8)),
        cols(static_cast<int>(cols_) - static_cast<int>(threadIdx.x % 8) * kChunk) {}
  __device__ __forceinline__ GlobalRows(const TensorView& view, int64_t batch, int64_t row, int64_t head, int rows_,
                                        int64_t head_dim, int first_col)
      : GlobalRows(first_element(view, batch, row, head, first_col), view.stride_row, rows_, head_dim - first_col) {}

  __device__ static __forceinline__ const T* first_element(const TensorView& view, int64_t batch, int64_t row,
                                                           int64_t head, int first_col) {
    return row_ptr<const T>(view, batch, row + threadIdx.x / 8, head) + first_col + threadIdx.x % 8 * kChunk;
  }
};

// Starts the copy of a tile by all threads of the block.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows(const Tile& tile, const GlobalRows<typename Tile::Element>& source) {
  using Source = GlobalRows<typename Tile::Element>;
  constexpr int kStep = kThreads / 8, kIterations = (Tile::kRows + kStep - 1) / kStep;
  const int first = threadIdx.x / 8, lane_col = threadIdx.x % 8 * Source::kChunk;
  const int64_t step = kStep * source.stride;
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block) {
    const int col = block * Source::kLine;
    const auto* from = source.data + col;
#pragma unroll
    for (int i = 0; i < kIterations; ++i, from += step) {
      const int row = i * kStep;
      if (Tile::kRows % kStep != 0 && first + row >= Tile::kRows) break;
      copy_16_bytes(tile.address(first + row, lane_col + col), from, row < source.rows && col < source.cols);
    }
  }
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

// The same to a row in global memory.
__device__ __forceinline__ void store_pair(float* row, int col, float x, float y) {
  *reinterpret_cast<float2*>(row + col) = {x, y};
}
template <class T>
__device__ __forceinline__ void store_pair(T* row, int col, float x, float y) {
  *reinterpret_cast<uint32_t*>(row + col) = pack(x, y, T{});
}

// Lane t of a quad gets word t of each of its lanes.
__device__ __forceinline__ uint4 quad_transpose(const uint32_t (&x)[4]) {
  const bool odd = lane_index() % 2 != 0, upper = lane_index() / 2 % 2 != 0;
  // Neighbours swap, so that each has words of one parity: of lanes 2i and 2i + 1, words `odd` and `odd` + 2.
  const uint32_t near0 = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  const uint32_t near1 = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  const uint32_t low[2] = {odd ? near0 : x[0], odd ? x[1] : near0}, high[2] = {odd ? near1 : x[2], odd ? x[3] : near1};
  uint32_t far[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) far[i] = __shfl_xor_sync(0xffffffffu, upper ? low[i] : high[i], 2);
  return upper ? uint4{far[0], far[1], high[0], high[1]} : uint4{low[0], low[1], far[0], far[1]};
}

// scale * x to a tensor, x an accumulator whose first element belongs to (row, col); `rows` and `cols` of it exist,
// cols counted from column 0. Its rows are whole vectors of 16 bytes.
template <class T, int M, int N>
__device__ __forceinline__ void write_rows(const Accumulator<M, N>& x, const TensorView& view, int64_t batch,
                                           int64_t row, int64_t head, int rows, int col, int cols, float scale) {
  x.for_each_row([&](int m, int half) {
    const int r = x.row(m, half);
    T* const to = row_ptr<T>(view, batch, row + r, head);
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
      // The quad of a row swaps what it holds, so that each lane has 16 bytes.
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && n + i < N; ++i)
          words[i] = pack(x.at(m, half, n + i, 0) * scale, x.at(m, half, n + i, 1) * scale, T{});
        const int c = col + 8 * (n + lane_index() % 4);
        const uint4 chunk = quad_transpose(words);
        if (r < rows && c < cols && n + lane_index() % 4 < N) *reinterpret_cast<uint4*>(to + c) = chunk;
      }
    } else {
      if (r >= rows) return;
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (const int c = col + x.col(n, 0); c < cols)
          store_pair(to, c, x.at(m, half, n, 0) * scale, x.at(m, half, n, 1) * scale);
    }
  });
}

}  // namespace fae::sm80
