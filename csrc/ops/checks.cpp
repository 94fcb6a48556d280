#include "checks.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <numbers>

#include "constraints.h"

namespace fae::ops {
namespace {

constexpr int64_t kMaxHeadDim = 512;

bool has_sizes(const Tensor& t, const Sizes& sizes) {
  const auto own = t.sizes();
  return std::equal(own.begin(), own.end(), sizes.begin(), sizes.end());
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

bool require_float(Constraints& c, const char* name, const Tensor& t) {
  return c.require(dtype_of(t).has_value(), name, " must be float64, float32, bfloat16 or float16, got ",
                   dtype_name(t));
}

// A tensor whose every fact follows from others of the call.
void require_tensor(Constraints& c, const char* name, const Tensor& t, const Tensor& device, ScalarType type,
                    const Sizes& sizes) {
  c.require(same_device(t, device), name, " must be on ", DeviceName{device}, ", got ", DeviceName{t});
  c.require(t.scalar_type() == type && has_sizes(t, sizes), name, " must be ", DTypeName{type}, " of shape ",
            Shape{sizes}, ", got ", dtype_name(t), " of shape ", shape_of(t));
}

// Lengths on a GPU are not looked at, because that would wait for it; FAE_CHECK=1 asks for it, to find a bug.
bool readable(const Tensor& t) {
  const char* check = std::getenv("FAE_CHECK");
  return t.is_cpu() || (t.is_cuda() && check && std::string(check) == "1");
}

std::vector<int64_t> host_values(const Tensor& t) {
  using torch::headeronly::DeviceType;
  const Tensor host = torch::stable::contiguous(t.is_cpu() ? t : torch::stable::to(t, DeviceType::CPU));
  const auto* values = static_cast<const int32_t*>(host.data_ptr());
  return {values, values + host.numel()};
}

// One side, queries or keys, of the arguments about lengths.
struct Side {
  const char* name;
  const MaybeTensor &cu_seqlens, &seqused;
  const MaybeInt& max_seqlen;
  int64_t rows;
};

// The values of cu_seqlens and seqused, whose shapes are right. Returns the longest used length.
int64_t check_length_values(Constraints& c, const Side& side, const Extents& e) {
  const auto starts = e.packed ? host_values(*side.cu_seqlens) : std::vector<int64_t>{};
  const auto used = side.seqused ? host_values(*side.seqused) : std::vector<int64_t>{};
  const auto length_of = [&](int64_t b) { return e.packed ? starts[b + 1] - starts[b] : side.rows; };
  int64_t longest = 0, decreasing = -1, misused = -1;
  for (int64_t b = e.batch - 1; b >= 0; --b) {  // backwards, so that the first violation is the one kept
    if (length_of(b) < 0) decreasing = b;
    if (side.seqused && (used[b] < 0 || used[b] > length_of(b))) misused = b;
    longest = std::max(longest, side.seqused ? used[b] : length_of(b));
  }
  if (e.packed) {
    c.require(starts.front() == 0, "cu_seqlens_", side.name, " must start at 0, got ", starts.front());
    c.require(starts.back() <= side.rows, "cu_seqlens_", side.name, " must end at or before ", side.rows,
              ", the rows of ", side.name, ", got ", starts.back());
  }
  if (decreasing >= 0)
    c.require(false, "cu_seqlens_", side.name, " must not decrease, got ", starts[decreasing + 1], " after ",
              starts[decreasing], " at index ", decreasing + 1);
  if (misused >= 0)
    c.require(false, "seqused_", side.name, " must be between 0 and the sequence's length (", length_of(misused),
              "), got ", used[misused], " at index ", misused);
  if (side.max_seqlen)
    c.require(longest <= *side.max_seqlen, "max_seqlen_", side.name, " must be at least the longest sequence (",
              longest, "), got ", *side.max_seqlen);
  return longest;
}

// Returns an upper bound on the sequences' lengths; nothing where it is unknown.
MaybeInt check_lengths(Constraints& c, const Side& side, const Extents& e) {
  const auto require_lengths = [&](const char* argument, const Tensor& t, int64_t size, const char* size_name) {
    return c.require(t.scalar_type() == ScalarType::Int && has_sizes(t, {size}), argument, side.name,
                     " must be int32 of shape (", size_name, ",) = (", size, ",), got ", dtype_name(t), " of shape ",
                     shape_of(t));
  };
  bool valid = c.require(!e.packed || side.cu_seqlens, "cu_seqlens_", side.name,
                         " must be given: a packed call takes cu_seqlens_q and cu_seqlens_k");
  if (side.cu_seqlens) valid &= require_lengths("cu_seqlens_", *side.cu_seqlens, e.batch + 1, "batch + 1");
  if (side.seqused) valid &= require_lengths("seqused_", *side.seqused, e.batch, "batch");
  if (const auto& hint = side.max_seqlen) {
    c.require(e.packed, "max_seqlen_", side.name, " must be None without cu_seqlens, got ", *hint);
    c.require(*hint >= 0, "max_seqlen_", side.name, " must be at least 0, got ", *hint);
  }

  const MaybeInt bound = e.packed ? side.max_seqlen : side.rows;
  const MaybeTensor& lengths = side.cu_seqlens ? side.cu_seqlens : side.seqused;
  if (!valid || !lengths || !readable(*lengths)) return bound;
  const int64_t longest = check_length_values(c, side, e);
  return e.packed ? longest : side.rows;
}

// bias or mask: each dimension 1 or the scores'. Packed sequences may be shorter than its rows and columns.
void check_score_matrix(Constraints& c, const char* name, const Tensor& t, const Extents& e, MaybeInt longest_q,
                        MaybeInt longest_k) {
  const auto sizes = t.sizes();
  bool fits = sizes.size() == 4;
  if (fits) {
    const auto covers = [&](int64_t size, MaybeInt length) {
      return size == 1 || !length || (e.packed ? size >= *length : size == *length);
    };
    fits = (sizes[0] == 1 || sizes[0] == e.batch) && (sizes[1] == 1 || sizes[1] == e.heads) &&
           covers(sizes[2], longest_q) && covers(sizes[3], longest_k);
  }
  const char* at_least = e.packed ? "at least " : "";
  const auto shown = [](MaybeInt length, const char* unknown) { return length ? std::to_string(*length) : unknown; };
  c.require(fits, name, sizes.size() == 4 ? " must" : " must have 4 dimensions that",
            " broadcast to (batch, heads, seqlen_q, seqlen_k) = (", e.batch, ", ", e.heads, ", ", at_least,
            shown(longest_q, "the longest"), ", ", at_least, shown(longest_k, "the longest"), "), got shape ",
            shape_of(t));
}

void check_options(Constraints& c, const Inputs& in, const Extents& e, MaybeInt longest_q, MaybeInt longest_k) {
  if (const auto& bias = in.bias) {
    const ScalarType type = bias->scalar_type();
    const bool or_float32 = dtype_of(in.q) == DType::bfloat16 || dtype_of(in.q) == DType::float16;
    c.require(type == in.q.scalar_type() || (or_float32 && type == ScalarType::Float), "bias must be ",
              dtype_name(in.q), or_float32 ? " or float32" : "", ", got ", dtype_name(*bias));
    check_score_matrix(c, "bias", *bias, e, longest_q, longest_k);
  }
  if (const auto& mask = in.mask) {
    c.require(mask->scalar_type() == ScalarType::Bool, "mask must be bool, got ", dtype_name(*mask));
    check_score_matrix(c, "mask", *mask, e, longest_q, longest_k);
  }
  if (const auto& slopes = in.alibi_slopes)
    c.require(slopes->scalar_type() == ScalarType::Float &&
                  (has_sizes(*slopes, {e.heads}) || has_sizes(*slopes, {e.batch, e.heads})),
              "alibi_slopes must be float32 of shape (heads,) = (", e.heads, ",) or (batch, heads) = (", e.batch, ", ",
              e.heads, "), got ", dtype_name(*slopes), " of shape ", shape_of(*slopes));
  if (const auto& sinks = in.sinks)
    c.require(sinks->scalar_type() == stats_type(in.q) && has_sizes(*sinks, {e.heads}), "sinks must be ",
              DTypeName{stats_type(in.q)}, " of shape (heads,) = (", e.heads, ",), got ", dtype_name(*sinks),
              " of shape ", shape_of(*sinks));
}

// Kernels for other dtypes than float64 hold the scale and the cap in float32, times log2(e).
constexpr double kSmallest = FLT_MIN, kLargest = FLT_MAX / std::numbers::log2e;

// Constraints that need no shape of q, k and v.
void check_scalars(Constraints& c, const Inputs& in) {
  const bool in_float32 = dtype_of(in.q) != DType::float64;
  const double scale = in.softmax_scale, cap = in.softcap;
  if (c.require(std::isfinite(scale), "softmax_scale must be finite, got ", scale))
    c.require(!in_float32 || std::abs(scale) <= kLargest, "softmax_scale must be at most ", kLargest,
              " in size, to fit in float32, got ", scale);
  if (c.require(std::isfinite(cap) && cap >= 0, "softcap must be finite and at least 0 (0: none), got ", cap))
    c.require(!in_float32 || cap == 0 || (cap >= kSmallest && cap <= kLargest), "softcap must be 0 or between ",
              kSmallest, " and ", kLargest, ", to fit in float32, got ", cap);
  c.require(in.dropout_p >= 0 && in.dropout_p <= 1, "dropout_p must be in [0, 1], got ", in.dropout_p);
  c.require(in.rng_state || !(in.dropout_p > 0), "rng_state must be given with dropout_p > 0 (", in.dropout_p, ")");
  if (const auto& state = in.rng_state)
    c.require(state->scalar_type() == ScalarType::Long && has_sizes(*state, {2}),
              "rng_state must be int64 of shape (2,), got ", dtype_name(*state), " of shape ", shape_of(*state));
}

// A meta tensor for q, which only explain brings here, stands for one on the device of any other argument.
void check_devices(Constraints& c, const Inputs& in) {
  const bool any = !in.q.is_cpu() && !in.q.is_cuda();
  const auto require = [&](const char* name, const Tensor& t) {
    c.require(any || same_device(t, in.q), name, " must be on q's device ", DeviceName{in.q}, ", got ", DeviceName{t});
  };
  require("k", in.k);
  require("v", in.v);
  const std::pair<const char*, const MaybeTensor&> options[] = {
      {"bias", in.bias},
      {"mask", in.mask},
      {"alibi_slopes", in.alibi_slopes},
      {"sinks", in.sinks},
      {"cu_seqlens_q", in.cu_seqlens_q},
      {"cu_seqlens_k", in.cu_seqlens_k},
      {"seqused_q", in.seqused_q},
      {"seqused_k", in.seqused_k},
      {"rng_state", in.rng_state},
  };
  for (const auto& [name, tensor] : options)
    if (tensor) require(name, *tensor);
}

bool check_ranks(Constraints& c, const Inputs& in) {
  bool met = true;
  const auto require = [&](const char* name, const Tensor& t, const char* dense, const char* packed) {
    met &= c.require(t.dim() == (in.packed() ? 3 : 4), name, " must have ", in.packed() ? packed : dense,
                     ", got shape ", shape_of(t));
  };
  require("q", in.q, "4 dimensions (batch, seqlen_q, heads, head_dim)",
          "3 dimensions (total_q, heads, head_dim) beside cu_seqlens");
  require("k", in.k, "4 dimensions (batch, seqlen_k, heads_kv, head_dim)",
          "3 dimensions (total_k, heads_kv, head_dim) beside cu_seqlens");
  require("v", in.v, "4 dimensions (batch, seqlen_k, heads_kv, head_dim_v)",
          "3 dimensions (total_k, heads_kv, head_dim_v) beside cu_seqlens");
  return met;
}

Extents extents_of(const Inputs& in) {
  Extents e;
  e.packed = in.packed();
  if (!e.packed)
    e.batch = in.q.size(0);
  else if (const auto& cu = in.cu_seqlens_q ? in.cu_seqlens_q : in.cu_seqlens_k; cu->dim() == 1)
    e.batch = std::max<int64_t>(cu->size(0) - 1, 0);
  const int64_t row = e.packed ? 0 : 1;
  e.rows_q = in.q.size(row);
  e.rows_k = in.k.size(row);
  e.heads = in.q.size(row + 1);
  e.heads_kv = in.k.size(row + 1);
  e.head_dim = in.q.size(row + 2);
  e.head_dim_v = in.v.size(row + 2);
  return e;
}

void check_shapes(Constraints& c, const Inputs& in, const Extents& e) {
  const Sizes k = e.packed ? Sizes{e.rows_k, e.heads_kv, e.head_dim} : Sizes{e.batch, e.rows_k, e.heads_kv, e.head_dim};
  Sizes v = k;
  v.back() = e.head_dim_v;
  c.require(has_sizes(in.k, k), "k must have q's ", e.packed ? "" : "batch and ", "head_dim: shape ", Shape{k},
            ", got shape ", shape_of(in.k));
  c.require(has_sizes(in.v, v), "v must have ", e.packed ? "" : "q's batch and ", "k's rows and heads: shape ",
            Shape{v}, ", got shape ", shape_of(in.v));
  c.require(e.heads_kv ? e.heads % e.heads_kv == 0 : e.heads == 0, "q's heads must be a multiple of k's (", e.heads_kv,
            "), got ", e.heads);
  c.require(e.head_dim >= 1 && e.head_dim <= kMaxHeadDim, "head_dim of q and k must be in [1, ", kMaxHeadDim, "], got ",
            e.head_dim);
  c.require(e.head_dim_v >= 1 && e.head_dim_v <= kMaxHeadDim, "head_dim of v must be in [1, ", kMaxHeadDim, "], got ",
            e.head_dim_v);
}

// Everything but the gradients. Nothing comes back where the ranks leave the sizes unknown.
std::optional<Extents> check_inputs(Constraints& c, const Inputs& in) {
  require_float(c, "q", in.q);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", in.k}, {"v", in.v}})
    c.require(t.scalar_type() == in.q.scalar_type(), name, " must have q's dtype (", dtype_name(in.q), "), got ",
              dtype_name(t));
  check_devices(c, in);
  check_scalars(c, in);
  if (!check_ranks(c, in)) return std::nullopt;

  Extents e = extents_of(in);
  check_shapes(c, in, e);
  const MaybeInt longest_q = check_lengths(c, {"q", in.cu_seqlens_q, in.seqused_q, in.max_seqlen_q, e.rows_q}, e);
  const MaybeInt longest_k = check_lengths(c, {"k", in.cu_seqlens_k, in.seqused_k, in.max_seqlen_k, e.rows_k}, e);
  check_options(c, in, e, longest_q, longest_k);
  e.max_seqlen_q = longest_q.value_or(e.rows_q);
  e.max_seqlen_k = longest_k.value_or(e.rows_k);
  return e;
}

}  // namespace

Extents check_forward(const Inputs& in) {
  Constraints c("forward");
  const auto extents = check_inputs(c, in);
  c.raise_unmet();
  return *extents;
}

Extents check_backward(const Inputs& in, const Gradients& g) {
  Constraints c("backward");
  const auto extents = check_inputs(c, in);
  if (extents) {
    require_tensor(c, "dout", g.dout, in.q, in.q.scalar_type(), extents->out_sizes());
    require_tensor(c, "out", g.out, in.q, in.q.scalar_type(), extents->out_sizes());
    require_tensor(c, "lse", g.lse, in.q, stats_type(in.q), extents->lse_sizes());
    if (g.dlse) require_tensor(c, "dlse", *g.dlse, in.q, stats_type(in.q), extents->lse_sizes());
  }
  c.require(in.bias || !g.bias_requires_grad, "bias must be given where bias_requires_grad is true");
  c.raise_unmet();
  return *extents;
}

void check_softmax(const Tensor& x) {
  Constraints c("softmax");
  require_float(c, "x", x);
  c.raise_unmet();
}

void check_softmax_backward(const Tensor& dy, const Tensor& y) {
  Constraints c("softmax_backward");
  require_float(c, "y", y);
  require_tensor(c, "dy", dy, y, y.scalar_type(), {y.sizes().begin(), y.sizes().end()});
  c.raise_unmet();
}

namespace {

void check_merge_inputs(Constraints& c, const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                        const Tensor& lse_b, Sizes& out, Sizes& lse) {
  require_float(c, "out_a", out_a);
  out.assign(out_a.sizes().begin(), out_a.sizes().end());
  if (!c.require(out.size() == 3 || out.size() == 4,
                 "out_a must have 4 dimensions (batch, seqlen_q, heads, head_dim_v) or 3 (total_q, heads, head_dim_v), "
                 "got shape ",
                 Shape{out}))
    return;
  lse = out.size() == 4 ? Sizes{out[0], out[2], out[1]} : Sizes{out[1], out[0]};
  require_tensor(c, "out_b", out_b, out_a, out_a.scalar_type(), out);
  require_tensor(c, "lse_a", lse_a, out_a, stats_type(out_a), lse);
  require_tensor(c, "lse_b", lse_b, out_a, stats_type(out_a), lse);
}

}  // namespace

void check_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  Constraints c("merge");
  Sizes out_sizes, lse_sizes;
  check_merge_inputs(c, out_a, lse_a, out_b, lse_b, out_sizes, lse_sizes);
  c.raise_unmet();
}

void check_merge_backward(const Tensor& dout, const Tensor& dlse, const Tensor& out_a, const Tensor& lse_a,
                          const Tensor& out_b, const Tensor& lse_b, const Tensor& out, const Tensor& lse) {
  Constraints c("merge_backward");
  Sizes out_sizes, lse_sizes;
  check_merge_inputs(c, out_a, lse_a, out_b, lse_b, out_sizes, lse_sizes);
  if (!lse_sizes.empty()) {
    require_tensor(c, "out", out, out_a, out_a.scalar_type(), out_sizes);
    require_tensor(c, "dout", dout, out_a, out_a.scalar_type(), out_sizes);
    require_tensor(c, "lse", lse, out_a, stats_type(out_a), lse_sizes);
    require_tensor(c, "dlse", dlse, out_a, stats_type(out_a), lse_sizes);
  }
  c.raise_unmet();
}

}  // namespace fae::ops
