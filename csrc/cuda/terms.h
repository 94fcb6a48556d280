#pragma once

#include "score_terms.h"

// The terms of a problem's scores, as far as kernels differ in them. One that looks for all has neither registers nor
// time left where a kernel made for a single term has both.

namespace fae::cuda {

// `any`: every term, and every scale.
enum class Terms { none, alibi, softcap, dropout, any };

FAE_INLINE Terms terms_of(const Problem& p) {
  const int terms = (p.softcap != 0) + (p.alibi_slopes != nullptr) + (p.dropout_p > 0);
  if (p.plain_scores()) return Terms::none;
  if (!(static_cast<float>(p.softmax_scale) > 0) || p.bias.data || p.mask.data || terms != 1) return Terms::any;
  if (p.alibi_slopes) return Terms::alibi;
  if (p.dropout_p > 0) return p.dropout_p < 1 ? Terms::dropout : Terms::any;
  return SoftcapSeries::holds(p) ? Terms::softcap : Terms::any;
}

// f(std::integral_constant) with a problem's terms.
template <class F>
auto with_terms(const Problem& p, F&& f) {
  switch (terms_of(p)) {
    case Terms::none:
      return f(std::integral_constant<Terms, Terms::none>{});
    case Terms::alibi:
      return f(std::integral_constant<Terms, Terms::alibi>{});
    case Terms::softcap:
      return f(std::integral_constant<Terms, Terms::softcap>{});
    case Terms::dropout:
      return f(std::integral_constant<Terms, Terms::dropout>{});
    case Terms::any:
      break;
  }
  return f(std::integral_constant<Terms, Terms::any>{});
}

}  // namespace fae::cuda
