#pragma once

#include "score_terms.h"

// The terms of a problem's scores, as far as kernels differ in them. One that looks for all has neither registers nor
// time left where a kernel made for a single term has both.

namespace fae::cuda {

// `any`: every term, and every scale.
enum class Terms { none, alibi, softcap, dropout, bias, mask, any };

FAE_INLINE Terms terms_of(const Problem& p) {
  const bool has_bias = p.bias.data != nullptr, has_mask = p.mask.data != nullptr;
  const int terms = (p.softcap != 0) + (p.alibi_slopes != nullptr) + (p.dropout_p > 0) + has_bias + has_mask;
  if (p.plain_scores()) return Terms::none;
  if (!(static_cast<float>(p.softmax_scale) > 0) || terms != 1) return Terms::any;
  if (p.alibi_slopes) return Terms::alibi;
  if (has_bias) return p.bias.dtype == p.dtype && p.bias.stride_col == 1 ? Terms::bias : Terms::any;
  if (has_mask) return p.mask.stride_col == 1 ? Terms::mask : Terms::any;
  if (p.dropout_p > 0) return dropout_threshold(p.dropout_p) <= kMostHalvesThreshold ? Terms::dropout : Terms::any;
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
    case Terms::bias:
      return f(std::integral_constant<Terms, Terms::bias>{});
    case Terms::mask:
      return f(std::integral_constant<Terms, Terms::mask>{});
    case Terms::any:
      break;
  }
  return f(std::integral_constant<Terms, Terms::any>{});
}

}  // namespace fae::cuda
