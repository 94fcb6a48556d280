#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../core/macros.h"
#include "../core/problem.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Vectors of one instruction set. Every kernel file is compiled once per level (FAE_LEVEL names it: portable, avx2,
// avx512, ...), and everything here lives in that level's namespace. The compiler's vector extension does the work;
// intrinsics appear only where they save instructions.

namespace fae::cpu::FAE_LEVEL {

#if defined(__AVX512F__) || defined(FAE_WIDE_VECTORS)  // vectors as wide as the rows of tiles.h
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
struct NativeVector {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class T>
struct Vec {
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
  using Native = typename NativeVector<T, width>::type;
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Mask = typename NativeVector<Int, width>::type;

  Native v;

  Vec() = default;
  FAE_INLINE Vec(T x) : v(x - Native{}) {}
  FAE_INLINE explicit Vec(Native x) : v(x) {}

  static FAE_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  FAE_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(v)); }

  // The first n < width elements; the others read as 0 and are not written.
  static FAE_INLINE Vec load(const T* p, int64_t n) {
    T buffer[width] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  FAE_INLINE void store(T* p, int64_t n) const {
    T buffer[width];
    store(buffer);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  // first, first + 1, first + 2, ...
  static FAE_INLINE Vec iota(T first) {
    Vec r;
    for (int i = 0; i < width; ++i) r.v[i] = first + static_cast<T>(i);
    return r;
  }

  FAE_INLINE Vec& operator+=(Vec o) { return v += o.v, *this; }
  FAE_INLINE Vec& operator*=(Vec o) { return v *= o.v, *this; }
};

#define FAE_VEC_OPERATOR(op)                                           \
  template <class T>                                                   \
  FAE_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {                  \
    return Vec<T>(a.v op b.v);                                         \
  }                                                                    \
  template <class T>                                                   \
  FAE_INLINE Vec<T> operator op(Vec<T> a, std::type_identity_t<T> b) { \
    return a op Vec<T>(b);                                             \
  }                                                                    \
  template <class T>                                                   \
  FAE_INLINE Vec<T> operator op(std::type_identity_t<T> a, Vec<T> b) { \
    return Vec<T>(a) op b;                                             \
  }
FAE_VEC_OPERATOR(+)
FAE_VEC_OPERATOR(-)
FAE_VEC_OPERATOR(*)
FAE_VEC_OPERATOR(/)
#undef FAE_VEC_OPERATOR

template <class T>
FAE_INLINE Vec<T> operator-(Vec<T> a) {
  return Vec<T>(-a.v);
}

// mask ? a : b for masks that come from comparing .v members.
template <class T>
FAE_INLINE Vec<T> select(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask ? a.v : b.v);
}

// As x > y ? x : y: a NaN in x is dropped, a NaN in y is kept.
template <class T>
FAE_INLINE Vec<T> max(Vec<T> x, Vec<T> y) {
  return select<T>(x.v > y.v, x, y);
}
// As x < y ? x : y, with NaN treated likewise.
template <class T>
FAE_INLINE Vec<T> min(Vec<T> x, Vec<T> y) {
  return select<T>(x.v < y.v, x, y);
}

template <class T>
FAE_INLINE T sum(Vec<T> x) {
  for (int n = Vec<T>::width / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] += x.v[i + n];
  return x.v[0];
}
template <class T>
FAE_INLINE T max(Vec<T> x) {
  for (int n = Vec<T>::width / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.v[i] = x.v[i] > x.v[i + n] ? x.v[i] : x.v[i + n];
  return x.v[0];
}
#if defined(__AVX512F__)
FAE_INLINE float sum(Vec<float> x) { return _mm512_reduce_add_ps(x.v); }
FAE_INLINE float max(Vec<float> x) { return _mm512_reduce_max_ps(x.v); }
#elif defined(__AVX2__)
FAE_INLINE float sum(Vec<float> x) {
  __m128 s = _mm256_castps256_ps128(x.v) + _mm256_extractf128_ps(x.v, 1);
  s += _mm_movehl_ps(s, s);
  return s[0] + s[1];
}
FAE_INLINE float max(Vec<float> x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return s[0] > s[1] ? s[0] : s[1];
}
#endif

template <class T>
FAE_INLINE Vec<T> abs_of(Vec<T> x) {
  return select<T>(x.v < T(0), -x, x);
}
template <class T>
FAE_INLINE T total_of(Vec<T> x) {
  return sum(x);
}

// ---- exp2, exp, log, tanh -------------------------------------------------------------------------------------------

// 2^x by minimax polynomials; Degree 5: relative error 8.3e-8 and exactly 1 at 0, so that a row of one key gives that
// key's value; Degree 3: 7.5e-5 (enough where the result is rounded to bfloat16). Exactly 0 for x below -126 and -inf;
// above 128 no less than 3.4e38; NaN stays NaN.
template <int Degree = 5>
FAE_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  // vreduce gives x - floor(x), and vscalef multiplies by 2^floor(x), underflow included: no clamp.
  const Vec<float> f(static_cast<Vec<float>::Native>(_mm512_reduce_ps(x.v, 1)));
  Vec<float> p;
  if constexpr (Degree == 3)
    p = ((f * 7.802452147e-2f + 2.260671556e-1f) * f + 6.958335638e-1f) * f + 9.999251962e-1f;
  else
    p = ((((f * 1.866952633e-3f + 9.017480537e-3f) * f + 5.579951406e-2f) * f + 2.401645929e-1f) * f +
         6.931512952e-1f) *
            f +
        1.0f;
  return Vec<float>(static_cast<Vec<float>::Native>(_mm512_scalef_ps(p.v, x.v)));
#else
  // Adding 1.5 * 2^23 leaves round(x) in the low mantissa bits, ready to be added to the exponent of p.
  using Native = Vec<float>::Native;
  using Bits = NativeVector<uint32_t, Vec<float>::width>::type;
  const Vec<float> capped = select<float>(x.v > 128.0f, Vec<float>(128.0f), x);
  const Vec<float> shifted = max(Vec<float>(-126.0f), capped) + 12582912.0f;
  const Vec<float> f = capped - (shifted - 12582912.0f);
  Vec<float> p;
  if constexpr (Degree == 3)
    p = ((f * 5.517166853e-2f + 2.426111251e-1f) * f + 6.932609677e-1f) * f + 9.999280572e-1f;
  else
    p = ((((f * 1.327647245e-3f + 9.675540961e-3f) * f + 5.550713092e-2f) * f + 2.402212024e-1f) * f +
         6.931469440e-1f) *
            f +
        1.0f;
  const Vec<float> r(reinterpret_cast<Native>(reinterpret_cast<Bits>(p.v) + (reinterpret_cast<Bits>(shifted.v) << 23)));
  return select<float>(x.v < -126.0f, Vec<float>(0.0f), r);
#endif
}

template <int Degree = 5>
FAE_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = __builtin_exp2(x.v[i]);
  return x;
}

constexpr double kLog2e = 1.4426950408889634074;

template <class T>
FAE_INLINE Vec<T> exp_of(Vec<T> x) {
  return exp2(x * static_cast<T>(kLog2e));
}

// An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel. Relative error below 3e-7.
FAE_INLINE Vec<float> tanh_of(Vec<float> x) {
  const Vec<float> x2 = x * x;
  const Vec<float> p =
      (((x2 * -5.515164230e-3f + 2.046941966e-2f) * x2 - 5.368802324e-2f) * x2 + 1.333083063e-1f) * x2 -
      3.333325982e-1f;
  const Vec<float> near_zero = x + x * x2 * p;
  const Vec<float> magnitude = abs_of(x);
  const Vec<float> capped = select<float>(magnitude.v > 20.0f, Vec<float>(20.0f), magnitude);  // NaN stays
  const Vec<float> far = 1.0f - 2.0f / (exp_of(capped * 2.0f) + 1.0f);
  return select<float>(magnitude.v < 0.65f, near_zero, select<float>(x.v < 0.0f, -far, far));
}
FAE_INLINE Vec<double> tanh_of(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = __builtin_tanh(x.v[i]);
  return x;
}

// ---- 16-bit storage types -------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FAE_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FAE_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T>
FAE_INLINE T to_compute(T x) {
  return x;
}
FAE_INLINE float to_compute(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
FAE_INLINE float to_compute(float16 x) {
  // Moves the exponent from 5 to 8 bits; multiplying by 2^112 corrects the bias and normalises subnormals.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | magnitude | 0x7f800000u);  // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

// Round to nearest even.
template <class S, class T>
FAE_INLINE S to_storage(T x) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<S, float16>) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds beyond 65504
    if (magnitude < 0x38800000u) {
      // Adding 0.5 rounds at 2^-24, the step of subnormal halves.
      const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
      return {static_cast<uint16_t>(sign | rounded)};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
  } else {
    return static_cast<S>(x);
  }
}

// Vectors of T from and to memory of storage type S.
template <class T, class S>
FAE_INLINE Vec<T> load_as(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return Vec<T>::load(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, float16> && std::is_same_v<T, float>) {
    return Vec<T>(static_cast<typename Vec<T>::Native>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<S, float16> && std::is_same_v<T, float>) {
    return Vec<T>(static_cast<typename Vec<T>::Native>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))));
#endif
#if defined(__AVX512F__)  // GCC 12 widens in two halves and joins them
  } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return Vec<T>(static_cast<typename Vec<T>::Native>(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))));
#else
  } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
    typename NativeVector<uint16_t, Vec<float>::width>::type half;
    std::memcpy(&half, p, sizeof(half));
    using Wide = typename NativeVector<uint32_t, Vec<float>::width>::type;
    return Vec<float>(reinterpret_cast<Vec<float>::Native>(__builtin_convertvector(half, Wide) << 16));
#endif
  } else {
    T buffer[Vec<T>::width];
    for (int i = 0; i < Vec<T>::width; ++i) buffer[i] = static_cast<T>(to_compute(p[i]));
    return Vec<T>::load(buffer);
  }
}

// The first n elements, or a whole vector where n is larger; the others read as 0 and are not written.
template <class T, class S>
FAE_INLINE Vec<T> load_as(const S* p, int64_t n) {
  if (n >= Vec<T>::width) return load_as<T>(p);
  T buffer[Vec<T>::width] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(to_compute(p[i]));
  return Vec<T>::load(buffer);
}

template <class S, class T>
FAE_INLINE void store_as(Vec<T> x, S* p) {
  if constexpr (std::is_same_v<S, T>) {
    x.store(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, float16> && std::is_same_v<T, float>) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<S, float16> && std::is_same_v<T, float>) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v));
#endif
  } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
    using Wide = typename NativeVector<uint32_t, Vec<float>::width>::type;
    using Narrow = typename NativeVector<uint16_t, Vec<float>::width>::type;
    const Wide bits = reinterpret_cast<Wide>(x.v);
    const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Wide result = (x.v != x.v) ? ((bits >> 16) | 0x40u) : rounded;
    const Narrow narrow = __builtin_convertvector(result, Narrow);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else {
    T buffer[Vec<T>::width];
    x.store(buffer);
    for (int i = 0; i < Vec<T>::width; ++i) p[i] = to_storage<S>(buffer[i]);
  }
}

template <class S, class T>
FAE_INLINE void store_as(Vec<T> x, S* p, int64_t n) {
  if (n >= Vec<T>::width) return store_as(x, p);
  T buffer[Vec<T>::width];
  x.store(buffer);
  for (int64_t i = 0; i < n; ++i) p[i] = to_storage<S>(buffer[i]);
}

// ---- transposition --------------------------------------------------------------------------------------------------

template <class V, int... I>
FAE_INLINE V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
}
template <class V, int... I>
FAE_INLINE V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
}

// Transposes width x width elements: log2(width) perfect shuffles of the rows.
template <class T>
FAE_INLINE void transpose(Vec<T> (&rows)[Vec<T>::width]) {
  constexpr int n = Vec<T>::width;
  using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i].v = interleave_low(rows[i].v, rows[i + n / 2].v, Lanes{});
      next[2 * i + 1].v = interleave_high(rows[i].v, rows[i + n / 2].v, Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// The sum of every vector, each in the lane of its index: a transposition that adds at every stage, and so halves what
// is left to shuffle.
template <class T>
FAE_INLINE Vec<T> lane_sums(Vec<T> (&rows)[Vec<T>::width]) {
  using Lanes = std::make_integer_sequence<int, Vec<T>::width>;
#pragma GCC unroll 4
  for (int n = Vec<T>::width / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      rows[i] = Vec<T>(interleave_low(rows[i].v, rows[i + n].v, Lanes{})) +
                Vec<T>(interleave_high(rows[i].v, rows[i + n].v, Lanes{}));
  return rows[0];
}

}  // namespace fae::cpu::FAE_LEVEL
