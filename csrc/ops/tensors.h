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

// Contiguous. Without the dispatcher, where torch::stable::new_empty goes, a tensor takes 0.2 instead of 0.9 us.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor new_empty_like(const Tensor& t) { return new_empty(t, t.sizes(), t.scalar_type()); }

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
