#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>

#include "../core/schedule.h"
#include "../ops/dispatch.h"
#include "module.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace fae::python {
namespace {

DType dtype_named(const std::string& name) {
  if (name == "float64") return DType::float64;
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float64, float32, bfloat16 or float16, got '" + name + "'");
}

// What backends look at when they accept or decline: sizes, options, and which pointers are given.
std::vector<py::dict> explain(const std::string& device, const std::string& dtype, int64_t batch, int64_t seqlen_q,
                              int64_t seqlen_k, int64_t heads, int64_t heads_kv, int64_t head_dim, int64_t head_dim_v,
                              bool packed, bool seqused_q, bool seqused_k, std::optional<int64_t> window_left,
                              std::optional<int64_t> window_right, double softmax_scale, double softcap, bool bias,
                              bool mask, bool alibi_slopes, bool sinks, double dropout_p, bool deterministic,
                              bool backward) {
  if (device != "cpu" && device != "cuda")
    throw std::invalid_argument("device must be 'cpu' or 'cuda', got '" + device + "'");
  alignas(16) static int64_t given[2] = {};  // stands for every tensor that is given; never read
  BackwardProblem p;
  p.dtype = dtype_named(dtype);
  p.batch = batch;
  p.heads = heads;
  p.heads_kv = heads_kv;
  if (ops::takes_whole_vectors(device == "cuda"))
    for (int64_t* dim : {&head_dim, &head_dim_v}) *dim = round_up(*dim, kVectorBytes / element_size(p.dtype));
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  p.max_seqlen_q = seqlen_q;
  p.max_seqlen_k = seqlen_k;
  const auto contiguous = [&](int64_t rows, int64_t row_heads, int64_t dim) {
    return TensorView{given, packed ? 0 : rows * row_heads * dim, row_heads * dim, dim};
  };
  p.q = contiguous(seqlen_q, heads, head_dim);
  p.k = contiguous(seqlen_k, heads_kv, head_dim);
  p.v = contiguous(seqlen_k, heads_kv, head_dim_v);
  p.out = p.dout = contiguous(seqlen_q, heads, head_dim_v);
  p.dq = p.q;
  p.dk = p.k;
  p.dv = p.v;
  p.lse.data = given;
  const auto* lengths = reinterpret_cast<const int32_t*>(given);
  if (packed) {
    p.total_q = batch * seqlen_q;
    p.total_k = batch * seqlen_k;
    p.cu_seqlens_q = p.cu_seqlens_k = lengths;
  }
  if (seqused_q) p.seqused_q = lengths;
  if (seqused_k) p.seqused_k = lengths;
  p.window_left = std::clamp(window_left.value_or(kUnlimited), -kUnlimited, kUnlimited);
  p.window_right = std::clamp(window_right.value_or(kUnlimited), -kUnlimited, kUnlimited);
  p.softmax_scale = softmax_scale;
  p.softcap = softcap;
  if (bias) p.bias.data = given;
  if (mask) p.mask.data = given;
  if (alibi_slopes) p.alibi_slopes = reinterpret_cast<const float*>(given);
  if (sinks) p.sinks = given;
  p.dropout_p = dropout_p;
  if (dropout_p > 0) p.rng_state = given;
  p.deterministic = deterministic;

  std::vector<py::dict> entries;
  for (const ops::Candidate& candidate : backward ? ops::candidates(p, device == "cuda")
                                                  : ops::candidates(static_cast<const Problem&>(p), device == "cuda")) {
    const bool accepted = candidate.reasons.empty();
    py::object kernel = py::none();
    if (accepted) kernel = py::str(candidate.backend->describe(p, backward));
    entries.push_back(py::dict("backend"_a = candidate.backend->name, "accepted"_a = accepted,
                               "reasons"_a = candidate.reasons, "kernel"_a = kernel));
  }
  return entries;
}

}  // namespace

void bind_explain(py::module_& m) {
  m.def(
      "explain", &explain, py::kw_only(), "device"_a, "dtype"_a, "batch"_a, "seqlen_q"_a, "seqlen_k"_a, "heads"_a,
      "heads_kv"_a, "head_dim"_a, "head_dim_v"_a, "packed"_a = false, "seqused_q"_a = false, "seqused_k"_a = false,
      "window_left"_a = py::none(), "window_right"_a = py::none(), "softmax_scale"_a = 1.0, "softcap"_a = 0.0,
      "bias"_a = false, "mask"_a = false, "alibi_slopes"_a = false, "sinks"_a = false, "dropout_p"_a = 0.0,
      "deterministic"_a = true, "backward"_a = false,
      "What every backend says to a call with these facts, in dispatch order: a list of dicts with backend, accepted, "
      "reasons (why not) and kernel (which one it would run, None where it does not accept). bias, mask, "
      "alibi_slopes, sinks, seqused_q, seqused_k: whether they are given. Packed: seqlen_q and seqlen_k are those of "
      "the longest sequence.");
}

}  // namespace fae::python
