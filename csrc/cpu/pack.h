#pragma once

#include "simd.h"

// Between the tensors' storage types and the packed operands of the kernels, which hold the compute type T (double for
// float64, else float) in rows padded with zeros to whole vectors.

namespace fae::cpu::FAE_LEVEL {

template <class T>
constexpr int64_t padded(int64_t cols) {
  return (cols + Vec<T>::width - 1) / Vec<T>::width * Vec<T>::width;
}

// Calls f with a value of the storage type behind a compute type and a dtype.
template <class T, class F>
FAE_INLINE void with_storage(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double{});
  } else {
    if (dtype == DType::float32) f(float{});
    if (dtype == DType::bfloat16) f(bfloat16{});
    if (dtype == DType::float16) f(float16{});
  }
}

// A run of rows of one head: where they start, in which type, how far apart (in elements).
struct Rows {
  DType dtype;
  void* data;
  int64_t stride;

  Rows(DType dtype_, const TensorView& view, int64_t batch, int64_t row, int64_t head)
      : dtype(dtype_),
        data(static_cast<char*>(view.data) +
             element_size(dtype_) * (batch * view.stride_batch + row * view.stride_row + head * view.stride_head)),
        stride(view.stride_row) {}
};

// Asks for rows that will be packed soon: rows of a head lie heads * head_dim apart, too far for the hardware to
// foresee. Into the second-level cache: rows a multiple of 4 KB apart share the sets of the first.
FAE_INLINE void prefetch_rows(const Rows& src, int64_t begin, int64_t end, int64_t cols) {
  const int64_t size = element_size(src.dtype);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t byte = 0; byte < cols * size; byte += 64)
      __builtin_prefetch(static_cast<const char*>(src.data) + i * src.stride * size + byte, 0, 2);
}

// dst[i][0 .. padded(cols)) = scale * src[i]
template <class T>
void pack_rows(const Rows& src, int64_t rows, int64_t cols, T scale, T* dst) {
  constexpr int W = Vec<T>::width;
  with_storage<T>(src.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = 0; i < rows; ++i, dst += padded<T>(cols)) {
      const S* x = static_cast<const S*>(src.data) + i * src.stride;
      int64_t d = 0;
      for (; d + W <= cols; d += W) (load_as<T>(x + d) * scale).store(dst + d);
      if (d < cols) (load_as<T>(x + d, cols - d) * scale).store(dst + d);
    }
  });
}

// dst[d][0 .. ld) = scale * src[0 .. rows)[d]: a panel with `ld` columns, zero from `rows` on. rows <= ld.
template <class T>
void pack_transposed(const Rows& src, int64_t rows, int64_t cols, T scale, T* dst, int64_t ld) {
  constexpr int W = Vec<T>::width;
  with_storage<T>(src.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t row = 0; row < ld; row += W) {
      const S* x = static_cast<const S*>(src.data) + row * src.stride;
      for (int64_t d = 0; d < cols; d += W) {
        Vec<T> block[W];
        const bool inside = row + W <= rows && d + W <= cols;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (inside)
            block[i] = load_as<T>(x + i * src.stride + d);
          else if (row + i < rows)
            block[i] = load_as<T>(x + i * src.stride + d, cols - d < W ? cols - d : W);
          else
            block[i] = T(0);
        }
        transpose<T>(block);
        const int64_t n = cols - d < W ? cols - d : W;
        for (int64_t i = 0; i < n; ++i) (block[i] * scale).store(dst + (d + i) * ld + row);
      }
    }
  });
}

// dst[i][0 .. cols) = scale * src[i], rows of src padded(cols) apart
template <class T>
void unpack_rows(const T* src, int64_t rows, int64_t cols, T scale, const Rows& dst) {
  constexpr int W = Vec<T>::width;
  with_storage<T>(dst.dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t i = 0; i < rows; ++i, src += padded<T>(cols)) {
      S* y = static_cast<S*>(dst.data) + i * dst.stride;
      int64_t d = 0;
      for (; d + W <= cols; d += W) store_as<S>(Vec<T>::load(src + d) * scale, y + d);
      if (d < cols) store_as<S>(Vec<T>::load(src + d) * scale, y + d, cols - d);
    }
  });
}

// Cuts one worker's part of the workspace into arrays, each on a cache line of its own. With a null base it only
// measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fae::cpu::FAE_LEVEL
