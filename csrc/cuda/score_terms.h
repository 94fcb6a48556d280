#pragma once

#include <type_traits>

#include "../core/band.h"
#include "../core/score.h"
#include "../core/softmax.h"
#include "accumulator.h"
#include "approx.h"
#include "dropout.h"

// What core/score.h says about scores, on an accumulator that holds q.k of some rows and columns of one head.

namespace fae::cuda {

using DeviceBand = BasicBand<int>;
constexpr int64_t kMaxSeqlen = int64_t{1} << 29;  // of queries and keys together: sums of positions fit an int

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

// How many rows or keys of a sequence a matrix over the scores has elements for. Sequences may turn out longer than it,
// where their lengths come from a tensor that nobody has checked.
__device__ __forceinline__ int extent_of(int length, int64_t size) {
  return size == 1 || length < size ? length : static_cast<int>(size);
}

// Puts `hidden` where a row does not see a key. `row0`, `col0`: where the accumulator begins. Some row must see a key.
template <class Scores>
__device__ __forceinline__ void mask_band(Scores& s, const DeviceBand& band, int row0, int col0,
                                          float hidden = minus_infinity<float>()) {
  const int diagonal = col0 - row0 - band.first, cols = band.seqlen_k - col0;
  const unsigned width = static_cast<unsigned>(band.last - band.first);
  s.for_each([&](int m, int half, int n, int e) {
    const int row = s.row(m, half), col = s.col(n, e);
    if (static_cast<unsigned>(diagonal + col - row) > width || col >= cols) s.at(m, half, n, e) = hidden;
  });
}

// The same, one side of the band after the other, as far as the accumulator reaches beyond them: that is mostly one,
// and takes half the time. More code, for loops that have nothing else to do: beside that of others, it costs more.
template <class Scores>
__device__ __forceinline__ void mask_sides(Scores& s, const DeviceBand& band, int row0, int col0) {
  const int row = s.row(0, 0), col = s.col(0, 0);
  const auto hide_where = [&](auto&& hidden) {
    // What is asked about an element is the same for all lanes, but for its limit.
    s.for_each([&](int m, int half, int n, int e) {
      if (hidden(s.row(m, half) - row, s.col(n, e) - col)) s.at(m, half, n, e) = minus_infinity<float>();
    });
  };
  const int first = band.first + row0 - col0, last = band.last + row0 - col0, end = band.seqlen_k - col0;
  if (last < Scores::kCols - 1) hide_where([limit = last + row - col](int i, int j) { return j - i > limit; });
  if (first > 1 - Scores::kRows) hide_where([limit = first + row - col](int i, int j) { return j - i < limit; });
  if (end < Scores::kCols) hide_where([limit = end - col](int, int j) { return j >= limit; });
}

// Where every element of a bias belongs to one score, its gradient is that score's. T: the bias's type, if not float.
template <class T>
__device__ __forceinline__ void write_bias_gradient(const ScoreView& view, const DeviceBand& band, int batch, int head,
                                                    int row, int key, float x) {
  if (row >= min(band.seqlen_q, static_cast<int>(view.size_row)) ||
      key >= min(band.seqlen_k, static_cast<int>(view.size_col)))
    return;
  const int64_t offset = score_offset(view, batch, head, row, key);
  if (view.dtype == DType::float32)
    static_cast<float*>(view.data)[offset] = x;
  else
    static_cast<T*>(view.data)[offset] = T(x);
}

// cap tanh(scale x / cap) in powers of two, as x times a polynomial in x^2, for |x| <= limit.
struct SoftcapSeries {
  static constexpr int kTerms = 4;
  float factors[kTerms], limit;

  FAE_INLINE explicit SoftcapSeries(const Problem& p) {
    // tanh(u) / u for |u| <= 0.625, to a relative error of 3e-6 (least maximum, found numerically).
    constexpr double kFactors[kTerms] = {0.99999709, -0.33309232, 0.13015459, -0.04002952}, kLimit = 0.625;
    const double inverse = holds(p) ? p.softmax_scale / p.softcap : 1;
    double power = p.softcap * inverse * 1.4426950408889634;
    for (int i = 0; i < kTerms; ++i, power *= inverse * inverse) factors[i] = static_cast<float>(kFactors[i] * power);
    limit = static_cast<float>(kLimit / inverse);
  }
  // Whether the factors, and the square of the cap, are numbers that a float holds, and errors are far below 1.
  static FAE_INLINE bool holds(const Problem& p) {
    const double inverse = p.softmax_scale / p.softcap;
    return inverse > 1e-4 && inverse < 1e4 && p.softcap > 1e-10 && p.softcap < 1e3;
  }
};

// A problem's numbers as the terms take them. Conversions from double and divisions take as long as the terms: a kernel
// whose call brings these finds them where instructions can take them from.
struct ScoreConstants {
  float scale;          // of products
  float softcap;        // 0: there is none
  float scale_softcap;  // products in units of the cap
  float kept_weight;    // of what dropout keeps
  uint32_t dropped;     // random bits up to these, which begin at the topmost one; 0: nothing is
  SoftcapSeries softcap_series;
  uint32_t threshold;  // of dropout, in both halves, for kept_halves
  float scale_log2;    // of products, to scores in powers of two

  FAE_INLINE explicit ScoreConstants(const Problem& p)
      : scale(static_cast<float>(p.softmax_scale)),
        softcap(static_cast<float>(p.softcap)),
        scale_softcap(p.softcap > 0 ? limited(p.softmax_scale / p.softcap) : 0.0f),
        kept_weight(static_cast<float>(dropout_scale(p.dropout_p))),
        dropped(last_dropped(dropout_threshold(p.dropout_p))),
        softcap_series(p),
        threshold(dropout_threshold(p.dropout_p) * 0x10001u),
        scale_log2(scale * kLog2e) {}
  FAE_INLINE bool drops() const { return kept_weight != 1; }
  // Half of a word decides: number 0 the lower one, 1 the upper one.
  FAE_INLINE bool keeps(uint32_t word, int half) const {
    return word << (half == 0 ? kUnused + 16 : kUnused) > dropped || dropped == 0;
  }

 private:
  static FAE_INLINE float limited(double x) {  // 0 times it is 0
    constexpr double kMost = 1e37;
    return static_cast<float>(x > kMost ? kMost : x < -kMost ? -kMost : x);
  }
  static constexpr int kUnused = 16 - DropoutBits::kBits;  // bits of a half
  static FAE_INLINE uint32_t last_dropped(uint32_t threshold) {
    return threshold == 0 ? 0 : (threshold << (16 + kUnused)) - 1;
  }
};

// tanh to 2^-16 of its value: scores are no more exact than the 16-bit numbers that they come from. The quotient is so
// to 2^-22 of the largest value, which for small ones is not enough, whatever the cap: there, two terms of the series.
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ float score_tanh(float x) {
  constexpr float kSmall = 1.0f / 32;
  const float power = exp2_approx(-2 * kLog2e * fabsf(x));
  const float quotient = copysignf((1 - power) * reciprocal_approx(1 + power), x);
  return fabsf(x) < kSmall ? x * fmaf(x * x, -1.0f / 3, 1.0f) : quotient;
}
template <class T, std::enable_if_t<sizeof(T) == 4, int> = 0>
__device__ __forceinline__ float score_tanh(float x) {
  return tanh_of(x);
}

// T: what scores are products of. A bias has that type or float.
template <class T>
class ScoreTerms {
 public:
  __device__ __forceinline__ ScoreTerms(const Problem& p, int batch, int head, const DeviceBand& band)
      : ScoreTerms(p, ScoreConstants(p), batch, head, band) {}
  __device__ __forceinline__ ScoreTerms(const Problem& p, const ScoreConstants& constants, int batch, int head,
                                        const DeviceBand& band)
      : p_(p), constants_(constants), batch_(batch), head_(head), seqlen_q_(band.seqlen_q), seqlen_k_(band.seqlen_k) {}

  // Raw products become scores. f(m, half, n, e, gradient) is told d score / d (scale q.k) where
  // softcap makes that differ from 1.
  template <class Scores, class F>
  __device__ __forceinline__ void apply(Scores& s, int row0, int col0, F&& gradient) const {
    if (constants_.softcap != 0)
      s.for_each([&](int m, int half, int n, int e) {
        float& x = s.at(m, half, n, e);
        const float tanh = score_tanh<T>(x * constants_.scale_softcap);
        x = constants_.softcap * tanh;
        gradient(m, half, n, e, 1 - tanh * tanh);
      });
    else
      s.for_each([&](int m, int half, int n, int e) { s.at(m, half, n, e) *= constants_.scale; });
    if (p_.alibi_slopes) {
      const float slope = alibi_slope(p_, batch_, head_);
      const int row = s.row(0, 0), col = s.col(0, 0);
      const float first = static_cast<float>(row0 + row + seqlen_k_ - seqlen_q_ - col0 - col);
      s.for_each([&](int m, int half, int n, int e) {
        const int more = (s.row(m, half) - row) - (s.col(n, e) - col);  // the same for all lanes
        s.at(m, half, n, e) += alibi(slope, first + static_cast<float>(more));
      });
    }
    if (p_.bias.data) add_bias(s, row0, col0);
    if (p_.mask.data) mask(s, row0, col0);
  }

  // f(m, half, n, e, kept) for every element: whether dropout keeps it. row0 and col0 are multiples of 16.
  template <class Scores, class F>
  __device__ __forceinline__ void dropout(const Scores& s, int row0, int col0, F&& f) const {
    for_each_dropout_call(s, row0, col0, [&](int i, int k, const uint32_t (&words)[4]) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        for_each_in_register<Scores>(
            i, k, r, [&](int b, int m, int half, int n, int e) { f(m, half, n, e, constants_.keeps(words[r], b)); });
    });
  }
  // The words of random bits for that (dropout.h).
  template <class Scores, class F>
  __device__ __forceinline__ void for_each_dropout_call(const Scores& s, int row0, int col0, F&& f) const {
    cuda::for_each_dropout_call(dropout_bits(p_, batch_, head_), s, row0, col0, f);
  }

 private:
  // f(m, half, n, e, x) for every element of a matrix over the scores, as type E, that belongs to an element of `s`.
  template <class E, class Scores, class F>
  __device__ __forceinline__ void for_each_inside(const ScoreView& view, const Scores& s, int row0, int col0,
                                                  F&& f) const {
    const E* const matrix = static_cast<const E*>(view.data) + score_offset(view, batch_, head_, row0, col0);
    const int rows = extent_of(seqlen_q_, view.size_row) - row0, cols = extent_of(seqlen_k_, view.size_col) - col0;
    const auto row_of = [&](int m, int half) { return matrix + s.row(m, half) * view.stride_row; };
    if (rows < Scores::kRows || cols < Scores::kCols || view.stride_col != 1) {
      s.for_each([&](int m, int half, int n, int e) {
        if (s.row(m, half) < rows && s.col(n, e) < cols)
          f(m, half, n, e, row_of(m, half)[s.col(n, e) * view.stride_col]);
      });
    } else if (Scores::kNeighbours && reinterpret_cast<uintptr_t>(matrix) % sizeof(Pair<E>) == 0 &&
               view.stride_row % 2 == 0) {
      s.for_each_row([&](int m, int half) {
        const E* const row = row_of(m, half) + s.col(0, 0);
#pragma unroll
        for (int n = 0; n < Scores::kColPieces; ++n) {
          const Pair<E> pair = *reinterpret_cast<const Pair<E>*>(row + s.col_step(n, 0));
          f(m, half, n, 0, pair.x[0]);
          f(m, half, n, 1, pair.x[1]);
        }
      });
    } else {
      s.for_each_row([&](int m, int half) {
        const E* const row = row_of(m, half) + s.col(0, 0);
#pragma unroll
        for (int n = 0; n < Scores::kColPieces; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) f(m, half, n, e, row[s.col_step(n, e)]);
      });
    }
  }
  template <class E>
  struct alignas(2 * sizeof(E)) Pair {
    E x[2];
  };

  template <class Scores>
  __device__ __forceinline__ void add_bias(Scores& s, int row0, int col0) const {
    const auto add = [&](int m, int half, int n, int e, auto x) { s.at(m, half, n, e) += as_float(x); };
    if (sizeof(T) == 4 || p_.bias.dtype != DType::float32)
      for_each_inside<T>(p_.bias, s, row0, col0, add);
    else
      for_each_inside<float>(p_.bias, s, row0, col0, add);
  }
  template <class Scores>
  __device__ __forceinline__ void mask(Scores& s, int row0, int col0) const {
    for_each_inside<uint8_t>(p_.mask, s, row0, col0, [&](int m, int half, int n, int e, uint8_t attend) {
      if (!attend) s.at(m, half, n, e) = minus_infinity<float>();
    });
  }

  const Problem& p_;
  const ScoreConstants constants_;
  const int batch_, head_, seqlen_q_, seqlen_k_;
};

}  // namespace fae::cuda
