#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/problem.h"

// torch's tensors, seen as the plain views of core.

namespace fae::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeInt = std::optional<int64_t>;

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

// Log-sum-exps and sinks: float, double for double inputs.
inline ScalarType stats_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

using Sizes = std::vector<int64_t>;

inline Tensor new_empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}
inline Tensor new_empty_like(const Tensor& t) {  // contiguous, whatever the strides of t
  return torch::stable::new_empty(t, t.sizes());
}

// The kernels read the last dimension as contiguous: anything else is copied once, here.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}
inline MaybeTensor with_contiguous_rows(const MaybeTensor& t) { return t ? with_contiguous_rows(*t) : t; }

inline void* data(const MaybeTensor& t) { return t ? t->data_ptr() : nullptr; }

// [batch, row, head, dim], or packed [row, head, dim].
inline TensorView tensor_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data_ptr(), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

// [batch, head, row], or packed [head, row].
inline StatsView stats_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data_ptr(), d == 3 ? t.stride(0) : 0, t.stride(d - 2), t.stride(d - 1)};
}

// [batch, head, row, column], every dimension full or 1.
inline ScoreView score_view(const MaybeTensor& t) {
  if (!t) return {};
  const auto step = [&](int64_t dim) { return t->size(dim) == 1 ? 0 : t->stride(dim); };
  return {t->data_ptr(), dtype_of(*t).value_or(DType::float32),
          t->size(0),    t->size(1),
          t->size(2),    t->size(3),
          step(0),       step(1),
          step(2),       step(3)};
}

}  // namespace fae::ops
