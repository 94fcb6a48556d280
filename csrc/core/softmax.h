#pragma once

#include "macros.h"

// Online softmax (arXiv 1805.02867, algorithm 3) as running statistics of one row, and the block formula that joins
// two of them. T is float or double.

namespace fae {

// exp and log of the scalar types; the CPU's vectors bring their own overloads.
FAE_INLINE float exp_of(float x) { return __builtin_expf(x); }
FAE_INLINE double exp_of(double x) { return __builtin_exp(x); }
FAE_INLINE float log_of(float x) { return __builtin_logf(x); }
FAE_INLINE double log_of(double x) { return __builtin_log(x); }

FAE_INLINE float exp2_of(float x) { return __builtin_exp2f(x); }
FAE_INLINE double exp2_of(double x) { return __builtin_exp2(x); }

// The unit of scores and maxima: factors of e, or factors of two where the exponential is a power of two anyway.
struct NaturalBase {
  template <class T>
  static FAE_INLINE T power(T x) {
    return exp_of(x);
  }
  static constexpr double kNatural = 1;  // natural units in one of these
};
struct BinaryBase {
  template <class T>
  static FAE_INLINE T power(T x) {
    return exp2_of(x);
  }
  static constexpr double kNatural = 0.693147180559945309;
};

template <class T>
FAE_INLINE T minus_infinity() {
  return -static_cast<T>(__builtin_inff());
}

// Subtracting a maximum of -inf from a score of -inf would give NaN: a row that has seen nothing subtracts 0 instead.
template <class T>
FAE_INLINE T finite_max(T m) {
  return m == minus_infinity<T>() ? T(0) : m;
}

// L may be a vector whose lanes each hold part of the sum; total_of adds them up.
FAE_INLINE float total_of(float x) { return x; }
FAE_INLINE double total_of(double x) { return x; }

template <class T, class L = T, class Base = NaturalBase>
struct RowState {
  T m = minus_infinity<T>();  // running maximum, in units of Base
  L l = T(0);                 // sum of exp(score - m)

  // Takes a block's maximum in and returns the factor exp(m_old - m_new) for what has been accumulated so far.
  FAE_INLINE T update_max(T block_max) {
    const T m_new = block_max > m ? block_max : m;
    const T factor = Base::power(m - finite_max(m_new));
    m = m_new;
    l *= factor;
    return factor;
  }

  // Takes another block's statistics in; returns the factors for what has been accumulated here and there.
  struct Factors {
    T mine, theirs;
  };
  FAE_INLINE Factors join(const RowState& other) {
    const T mine = update_max(other.m), theirs = Base::power(other.m - finite_max(m));
    l += other.l * theirs;
    return {mine, theirs};
  }

  // All of a row, in natural units.
  FAE_INLINE RowState<T> total() const { return {m * T(Base::kNatural), total_of(l)}; }

  // A sink is one more logit that takes part in the sum and has no value row.
  FAE_INLINE T add_sink(T sink) {
    static_assert(Base::kNatural == 1);
    const T factor = update_max(sink);
    l += Base::power(sink - finite_max(m));
    return factor;
  }

  FAE_INLINE T lse() const {
    static_assert(Base::kNatural == 1);
    return l == T(0) ? minus_infinity<T>() : m + log_of(l);
  }
  FAE_INLINE T inverse_sum() const { return l == T(0) ? T(0) : T(1) / l; }
};

// Two normalised blocks with log-sum-exps a and b join as  out = weight_a * out_a + weight_b * out_b.
template <class T>
struct Merge {
  T lse, weight_a, weight_b;
};

template <class T>
FAE_INLINE Merge<T> merge(T a, T b) {
  const T m = finite_max(a > b ? a : b);
  const T wa = exp_of(a - m), wb = exp_of(b - m), sum = wa + wb;
  if (sum == T(0)) return {minus_infinity<T>(), T(0), T(0)};
  return {m + log_of(sum), wa / sum, wb / sum};
}

}  // namespace fae
