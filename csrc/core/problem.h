#pragma once

#include <cstdint>
#include <type_traits>

#include "macros.h"

// One attention call, complete: plain data that goes by value from the op boundary into a kernel.
// Strides count elements. Null pointers mean "not given". Lengths that live in tensors (cu_seqlens, seqused) are read
// by the kernels, which clamp them to the tensors' extents, so that no content can make them reach outside.

namespace fae {

enum class DType : int8_t { float64, float32, bfloat16, float16 };

FAE_INLINE int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// [batch, row, head, dim] with dim contiguous. A packed (varlen) tensor [total, head, dim] has stride_batch 0 and its
// sequences start at row cu_seqlens[batch].
struct TensorView {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_row = 0, stride_head = 0;
};

// lse, delta and friends: dense [batch, head, row]; packed [head, total rows] with stride_batch 0.
struct StatsView {
  void* data = nullptr;  // float, or double where the inputs are float64
  int64_t stride_batch = 0, stride_head = 0, stride_row = 1;
};

// A matrix over the scores [batch, head, row, column]; broadcast dimensions have stride 0 (and size 1).
struct ScoreView {
  void* data = nullptr;
  DType dtype = DType::float32;  // unused by the boolean mask
  int64_t size_batch = 1, size_head = 1, size_row = 1, size_col = 1;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0, stride_col = 0;
};

constexpr int64_t kUnlimited = int64_t{1} << 40;  // a window side without a limit

struct Problem {
  DType dtype = DType::float32;
  int64_t batch = 0, heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // dense: the sizes; varlen: an upper bound (hint or total)
  int64_t total_q = 0, total_k = 0;            // varlen: rows in the packed tensors

  TensorView q, k, v;  // k, v have heads_kv heads
  TensorView out;      // head_dim_v columns
  StatsView lse;

  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1]
  const int32_t* seqused_q = nullptr;     // [batch]
  const int32_t* seqused_k = nullptr;     // [batch]

  // Row i sees keys j with  i + shift - window_left <= j <= i + shift + window_right,  shift = seqlen_k - seqlen_q.
  int64_t window_left = kUnlimited, window_right = kUnlimited;

  double softmax_scale = 1.0;
  double softcap = 0.0;                 // 0: none
  const float* alibi_slopes = nullptr;  // [heads] or [batch, heads]
  int64_t alibi_stride_batch = 0;
  ScoreView bias;               // added to the scores
  ScoreView mask;               // uint8, nonzero = attend
  const void* sinks = nullptr;  // [heads], same type as lse

  double dropout_p = 0.0;
  const int64_t* rng_state = nullptr;  // [2]: seed, offset

  bool deterministic = true;
  bool allow_tf32 = false;  // float32 products may round their factors to tf32

  // Whether lengths of sequences lie in tensors: those that are numbers here are then the most they can be.
  FAE_INLINE bool lengths_in_tensors() const { return cu_seqlens_q || cu_seqlens_k || seqused_q || seqused_k; }
  // Whether rows can see different numbers of keys, so that blocks of rows take different times.
  FAE_INLINE bool uneven() const {
    return window_left < max_seqlen_k || window_right < max_seqlen_k || lengths_in_tensors();
  }

  // Whether scores need more than scale and band before the softmax (template switch of the kernels).
  FAE_INLINE bool general_scores() const {
    return softcap != 0.0 || alibi_slopes || bias.data || mask.data || dropout_p > 0.0;
  }
  // Whether rows may see fewer keys than there are.
  FAE_INLINE bool hides_scores() const {
    return window_left != kUnlimited || window_right != kUnlimited || lengths_in_tensors();
  }
  // Whether scores are q.k times a positive scale and nothing else: then the scale can wait until the exponential,
  // since it leaves the order of scores and the -inf of masked ones as they are.
  FAE_INLINE bool plain_scores() const { return !general_scores() && static_cast<float>(softmax_scale) > 0; }
};

struct BackwardProblem : Problem {
  TensorView dout;  // like out
  StatsView dlse;   // null data: no gradient through lse
  TensorView dq, dk, dv;
  StatsView delta;  // workspace: rowsum(dout * out) - dlse
  ScoreView dbias;  // bias's own shape; null data: not wanted
  void* dsinks = nullptr;
};

// Rows and keys of one sequence of the batch, clamped to what the tensors hold.
struct Sequence {
  int64_t q_start = 0, k_start = 0;  // first row in a packed tensor (0 when dense)
  int64_t seqlen_q = 0, seqlen_k = 0;
};

template <class A, class B>
FAE_INLINE std::common_type_t<A, B> clamp_length(A x, B limit) {
  return x < 0 ? 0 : x > limit ? limit : x;
}

FAE_INLINE Sequence sequence_of(const Problem& p, int64_t b) {
  Sequence s;
  s.seqlen_q = p.max_seqlen_q;
  s.seqlen_k = p.max_seqlen_k;
  if (p.cu_seqlens_q) {
    s.q_start = clamp_length(p.cu_seqlens_q[b], p.total_q);
    s.seqlen_q = clamp_length(p.cu_seqlens_q[b + 1], p.total_q) - s.q_start;
  }
  if (p.cu_seqlens_k) {
    s.k_start = clamp_length(p.cu_seqlens_k[b], p.total_k);
    s.seqlen_k = clamp_length(p.cu_seqlens_k[b + 1], p.total_k) - s.k_start;
  }
  s.seqlen_q = clamp_length(p.seqused_q ? p.seqused_q[b] : s.seqlen_q, s.seqlen_q);
  s.seqlen_k = clamp_length(p.seqused_k ? p.seqused_k[b] : s.seqlen_k, s.seqlen_k);
  return s;
}

// Typed addresses of row `row` of sequence `s` (of batch b) and of an element of the score matrices.
template <class T>
FAE_INLINE T* row_ptr(const TensorView& t, int64_t b, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + b * t.stride_batch + row * t.stride_row + head * t.stride_head;
}

template <class T>
FAE_INLINE T* stats_ptr(const StatsView& t, int64_t b, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + b * t.stride_batch + head * t.stride_head + row * t.stride_row;
}

FAE_INLINE int64_t score_offset(const ScoreView& t, int64_t b, int64_t head, int64_t row, int64_t col) {
  return b * t.stride_batch + head * t.stride_head + row * t.stride_row + col * t.stride_col;
}

}  // namespace fae
