#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../core/backend.h"
#include "../core/schedule.h"

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

// Backends that take whole vectors (core/backend.h) get a copy of any other tensor, its rows filled up with zeros;
// their results come in tensors of such rows, and the columns that were asked for are taken from there.
inline Sizes sizes_in_whole_vectors(const Tensor& t) {
  Sizes sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = round_up(sizes.back(), kVectorBytes / static_cast<int64_t>(t.element_size()));
  return sizes;
}
inline bool has_whole_vectors(const Tensor& t) {
  const auto element_size = static_cast<int64_t>(t.element_size());
  bool whole = reinterpret_cast<uintptr_t>(t.data_ptr()) % kVectorBytes == 0;
  whole &= t.size(t.dim() - 1) * element_size % kVectorBytes == 0;
  for (int64_t i = 0; i < t.dim() - 1; ++i) whole &= t.size(i) == 1 || t.stride(i) * element_size % kVectorBytes == 0;
  return whole;
}
inline Tensor columns_of(Tensor t, int64_t count) { return torch::stable::narrow(t, t.dim() - 1, 0, count); }
inline Tensor with_whole_vectors(const Tensor& t) {
  if (has_whole_vectors(t)) return t;
  const int64_t columns = t.size(t.dim() - 1);
  Tensor copy = new_empty(t, sizes_in_whole_vectors(t), t.scalar_type());
  if (copy.size(t.dim() - 1) > columns) torch::stable::zero_(copy);
  Tensor part = columns_of(copy, columns);
  torch::stable::copy_(part, t);
  return copy;
}
inline Tensor for_whole_vectors(const Tensor& result) {
  return has_whole_vectors(result) ? result : new_empty(result, sizes_in_whole_vectors(result), result.scalar_type());
}
inline void take_columns(Tensor& result, const Tensor& from) {
  const int64_t columns = result.size(result.dim() - 1);
  if (from.size(from.dim() - 1) != columns) torch::stable::copy_(result, columns_of(from, columns));
}

inline void* data(const MaybeTensor& t) { return t ? t->data_ptr() : nullptr; }

// From one index of a dimension to the next. A dimension of size 1 may have any stride: kernels that compute addresses
// of rows past the end, without reading there, want whole vectors of them, too.
inline int64_t step(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

// [batch, row, head, dim], or packed [row, head, dim].
inline TensorView tensor_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data_ptr(), d == 4 ? step(t, 0) : 0, step(t, d - 3), step(t, d - 2)};
}

// [batch, head, row], or packed [head, row].
inline StatsView stats_view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data_ptr(), d == 3 ? step(t, 0) : 0, step(t, d - 2), step(t, d - 1)};
}

// [batch, head, row, column], every dimension full or 1.
inline ScoreView score_view(const MaybeTensor& t) {
  if (!t) return {};
  return {t->data_ptr(), dtype_of(*t).value_or(DType::float32),
          t->size(0),    t->size(1),
          t->size(2),    t->size(3),
          step(*t, 0),   step(*t, 1),
          step(*t, 2),   step(*t, 3)};
}

}  // namespace fae::ops
