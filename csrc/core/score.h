#pragma once

#include "philox.h"
#include "problem.h"

// What happens to a score between q.k and the softmax, written once for every backend:
//   score = softcap(scale * q.k) + ALiBi + bias;  masked elements become -inf.
// V is float or double, or a SIMD vector of neighbouring columns; tanh_of and abs_of come with the type.

namespace fae {

FAE_INLINE float tanh_of(float x) { return __builtin_tanhf(x); }
FAE_INLINE double tanh_of(double x) { return __builtin_tanh(x); }
FAE_INLINE float abs_of(float x) { return __builtin_fabsf(x); }
FAE_INLINE double abs_of(double x) { return __builtin_fabs(x); }

template <class V>
FAE_INLINE V apply_softcap(V score, V softcap) {
  return softcap * tanh_of(score / softcap);
}

// d softcap(s) / d s, from the capped score.
template <class V>
FAE_INLINE V softcap_gradient(V capped, V softcap) {
  const V t = capped / softcap;
  return 1 - t * t;
}

// ALiBi penalises the distance from the diagonal, which is aligned to the bottom right: -slope * |i + shift - j|.
FAE_INLINE float alibi_slope(const Problem& p, int64_t b, int64_t head) {
  return p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_batch + head] : 0.0f;
}

// `distance` is i + shift - j.
template <class V>
FAE_INLINE V alibi(V slope, V distance) {
  return -slope * abs_of(distance);
}

}  // namespace fae
