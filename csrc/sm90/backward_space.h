#pragma once

#include "../cuda/backward_space.h"
#include "../sm80/kernels.h"
#include "backward_separate.h"
#include "kernels.h"

// The workspace of a backward: what cuda/backward_space.h says and what the kernels here need beside it.

namespace fae::sm90 {

template <class Config>
struct BackwardSpace : cuda::BackwardSpace {
  uint4* statistics;
  int64_t key_blocks;  // per head
  float* dkv_partial;  // of every key block that several tasks add to; separate kernels: dK of all, then dV of all
  void* bias_gradient;

  BackwardSpace(const BackwardProblem& p, void* base)
      : cuda::BackwardSpace(p, base, Config::kRows, Config::kKeys, Config::kSeparate ? 0 : Config::kRows * Config::kDim,
                            key_counters(p), Config::kSeparate || p.dsinks || sums_dbias(p)) {
    statistics = take<uint4>(heads * (p.cu_seqlens_q ? p.total_q : p.max_seqlen_q));
    key_blocks = key_blocks_of(p);
    dkv_partial = take<float>(shared_key_blocks(p) * 2 * Config::kKeys * Config::kDim);
    const size_t bias_bytes = sums_dbias(p) ? bias_gradient_workspace<Config::kDim>(p) : 0;
    bias_gradient = take<char>(static_cast<int64_t>(bias_bytes));
  }

  // Whether dS is the gradient of the bias: no element belongs to several scores, and nothing comes between the two.
  static bool writes_dbias(const BackwardProblem& p) {
    return p.dbias.data && !sm80::broadcasts(p, p.dbias) && p.softcap == 0;
  }
  // Otherwise a kernel of its own does, which reads delta, as that for the gradients of sinks does.
  static bool sums_dbias(const BackwardProblem& p) { return p.dbias.data && !writes_dbias(p); }
  static PackedBlocks packed_key_blocks(const BackwardProblem& p) {
    return PackedBlocks(p.cu_seqlens_k, p.batch, p.total_k, Config::kKeys);
  }

  // Of all heads of keys.
  static int64_t shared_key_blocks(const BackwardProblem& p) {
    const bool few_rows = !Config::kSeparate && (p.cu_seqlens_q ? p.total_q : p.max_seqlen_q) <= Config::kFewRows;
    return p.heads == p.heads_kv || few_rows ? 0 : (p.cu_seqlens_k ? 1 : p.batch) * p.heads_kv * key_blocks_of(p);
  }

 private:
  static int64_t key_blocks_of(const BackwardProblem& p) {
    return p.cu_seqlens_k ? packed_key_blocks(p).size() : ceil_div(p.max_seqlen_k, int64_t{Config::kKeys});
  }
  static int64_t key_counters(const BackwardProblem& p) {
    return shared_key_blocks(p) * 4 * Config::kWarpgroups * (Config::kSeparate ? 2 : 1) +
           (Config::kSeparate ? kGradientKernels : 0);
  }
};

}  // namespace fae::sm90
