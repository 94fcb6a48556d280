#pragma once

#include "../core/band.h"
#include "../core/score.h"
#include "../core/softmax.h"
#include "simd.h"

// A block of scores between the products: up to kBlockKeys columns of a few rows, kBlockKeys apart.

namespace fae::cpu::FAE_LEVEL {

constexpr int64_t kBlockKeys = 64;

// n values of a score matrix (bias) from an offset on, whatever their type and stride.
template <class T>
void load_score_row(const ScoreView& view, int64_t offset, int64_t n, T* dst) {
  const auto copy = [&](auto storage) {
    const auto* x = static_cast<const decltype(storage)*>(view.data) + offset;
    for (int64_t j = 0; j < n; ++j) dst[j] = static_cast<T>(to_compute(x[j * view.stride_col]));
  };
  switch (view.dtype) {
    case DType::float64:
      return copy(double{});
    case DType::float32:
      return copy(float{});
    case DType::bfloat16:
      return copy(bfloat16{});
    case DType::float16:
      return copy(float16{});
  }
}

// The score terms of one head of one sequence, and its dropout.
template <class T>
class ScoreTerms {
 public:
  ScoreTerms(const Problem& p, int64_t batch, int64_t head, const Sequence& s)
      : p_(p), batch_(batch), head_(head), shift_(s.seqlen_k - s.seqlen_q), seqlen_k_(s.seqlen_k) {
    if (p.dropout_p > 0) bits_ = dropout_bits(p, batch, head);
  }

  bool any() const { return p_.softcap != 0 || p_.alibi_slopes || p_.bias.data || p_.mask.data; }
  bool dropout() const { return p_.dropout_p > 0; }

  // Softcap, ALiBi, bias and mask on scores[rows][col_begin .. col_end) of a block that starts at (row0, key0). The
  // column bounds are multiples of the vector width. cap_gradient, where given, takes d capped / d score.
  void apply(T* scores, int64_t row0, int64_t rows, int64_t key0, int64_t col_begin, int64_t col_end,
             T* cap_gradient = nullptr) const {
    const int64_t valid = seqlen_k_ - key0 < col_end ? seqlen_k_ - key0 : col_end;
    for (int64_t i = 0; i < rows; ++i, scores += kBlockKeys) {
      if (p_.softcap != 0) cap(scores, cap_gradient ? cap_gradient + i * kBlockKeys : nullptr, col_begin, col_end);
      if (p_.alibi_slopes) add_alibi(scores, row0 + i, key0, col_begin, col_end);
      if (p_.bias.data) add_bias(scores, row0 + i, key0, col_begin, valid);
      if (p_.mask.data) mask(scores, row0 + i, key0, col_begin, valid);
    }
  }

  // 1 / (1 - p) or 0 for the elements [col_begin, col_end) of a row, in multiples of 16 columns.
  void dropout_factors(int64_t row, int64_t key0, int64_t col_begin, int64_t col_end, T* factors) const {
    const uint32_t threshold = dropout_threshold(p_.dropout_p);
    const T kept = static_cast<T>(dropout_scale(p_.dropout_p));
    const int64_t row_group = DropoutBits::group(row);
    for (int64_t col = col_begin / 16 * 16; col < col_end; col += 16) {
      const int64_t col_group = DropoutBits::group(key0 + col);
      Philox4 calls[DropoutBits::kGroups];
      bits_.calls(calls, [&](int) { return row_group; }, [&](int i) { return col_group + i; });
      for (int i = 0; i < DropoutBits::kGroups; ++i) {
        uint32_t values[2];
        DropoutBits::values_of_row(calls[i], row, values);
        for (int half = 0; half < 2; ++half)
          for (int e = 0; e < 2; ++e) {
            const uint32_t bits = values[half] >> DropoutBits::shift_of(e) & DropoutBits::kMask;
            factors[col + 8 * half + 2 * i + e] = bits < threshold ? T(0) : kept;
          }
      }
    }
  }

 private:
  static constexpr int W = Vec<T>::width;

  void cap(T* scores, T* gradient, int64_t begin, int64_t end) const {
    const Vec<T> softcap = static_cast<T>(p_.softcap);
    for (int64_t j = begin; j < end; j += W) {
      const Vec<T> capped = apply_softcap(Vec<T>::load(scores + j), softcap);
      capped.store(scores + j);
      if (gradient) softcap_gradient(capped, softcap).store(gradient + j);
    }
  }
  void add_alibi(T* scores, int64_t row, int64_t key0, int64_t begin, int64_t end) const {
    const Vec<T> slope = static_cast<T>(alibi_slope(p_, batch_, head_));
    const T diagonal = static_cast<T>(row + shift_ - key0);
    for (int64_t j = begin; j < end; j += W)
      (Vec<T>::load(scores + j) + alibi(slope, diagonal - Vec<T>::iota(static_cast<T>(j)))).store(scores + j);
  }
  void add_bias(T* scores, int64_t row, int64_t key0, int64_t begin, int64_t end) const {
    T bias[kBlockKeys];
    load_score_row(p_.bias, score_offset(p_.bias, batch_, head_, row, key0 + begin), end - begin, bias);
    for (int64_t j = begin; j < end; ++j) scores[j] += bias[j - begin];
  }
  void mask(T* scores, int64_t row, int64_t key0, int64_t begin, int64_t end) const {
    const uint8_t* attend = static_cast<const uint8_t*>(p_.mask.data) + score_offset(p_.mask, batch_, head_, row, key0);
    for (int64_t j = begin; j < end; ++j)
      if (!attend[j * p_.mask.stride_col]) scores[j] = minus_infinity<T>();
  }

  const Problem& p_;
  int64_t batch_, head_, shift_, seqlen_k_;
  DropoutBits bits_;
};

// Puts -inf where row `row` of the block does not see a key of [col_begin, col_end).
template <class T>
FAE_INLINE void mask_band(T* scores, const Band& band, int64_t row, int64_t key0, int64_t col_begin, int64_t col_end) {
  const int64_t lo = band.lo(row) - key0, hi = band.hi(row) - key0;
  for (int64_t j = col_begin; j < col_end && j < lo; ++j) scores[j] = minus_infinity<T>();
  for (int64_t j = hi > col_begin ? hi : col_begin; j < col_end; ++j) scores[j] = minus_infinity<T>();
}

}  // namespace fae::cpu::FAE_LEVEL
