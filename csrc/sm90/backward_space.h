#pragma once

#include "../cuda/backward_space.h"
#include "../sm80/kernels.h"
#include "backward_separate.h"
#include "kernels.h"
#include "tensor_map.h"

// The workspace of a backward: what cuda/backward_space.h says and what the kernels here need beside it.

namespace fae::sm90 {

template <class Config>
struct BackwardSpace : cuda::BackwardSpace {
  cuda::RowStatistics statistics;
  int64_t key_blocks;  // per head
  float* dkv_partial;  // of every key block that several tasks add to; separate kernels: dK of all, then dV of all
  void* bias_gradient;

  BackwardSpace(const BackwardProblem& p, void* base)
      : cuda::BackwardSpace(p, base, Config::kPlaceRows, Config::kKeys,
                            Config::kSeparate ? 0 : Config::kPlaceRows * Config::kDim, key_counters(p),
                            Config::kSeparate || p.dsinks || sums_dbias(p)) {
    if (keeps_statistics_in_dq(p)) {
      statistics.rows = {p.dq.data, p.dq.stride_batch / 8, p.dq.stride_row / 8 * kGroup, p.dq.stride_head / 8};
      statistics.group_bits = kGroupBits;
    } else {
      statistics.rows = {take<uint4>(heads * rows_of(p)), delta.stride_batch, 1, delta.stride_head};
    }
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

  // Whether blocks of keys may go round. Which ones do follows from their sequence alone, and so does the order of the
  // others: it is the same for all of a head wherever some may.
  static bool may_go_round(const BackwardProblem& p) {
    return Config::kGoesRound && p.window_left == kUnlimited && p.window_right == kUnlimited;
  }
  // Whether any may of this call, on this card: smaller ones would have room for one large wave, and then for none.
  static bool rounds(const BackwardProblem& p) {
    if (!may_go_round(p) || cuda::multiprocessors() < 2 * Round::kMost) return false;
    if (p.lengths_in_tensors()) return true;
    const bool few_rows = p.heads != p.heads_kv && p.max_seqlen_q <= Config::kFewRows;
    return !few_rows && Round::size(key_blocks_of(p), ceil_div(p.max_seqlen_q, int64_t{Config::kRows})) > 1;
  }
  int* waves(const BackwardProblem& p) const { return rounds(p) ? others() + key_turns(p) : nullptr; }

  // For copies of the statistics of so many rows, which begin a group; a copy's row is the group's number.
  TensorMap statistics_map(const BackwardProblem& p, int box_rows) const {
    const int group = 1 << statistics.group_bits;
    const TensorView& rows = statistics.rows;
    return make_tensor_map(DType::bfloat16,
                           {rows.data, 8 * rows.stride_batch, 8 * rows.stride_row, 8 * rows.stride_head},
                           {8 * group, ceil_div(rows_of(p), int64_t{group}), p.heads, p.cu_seqlens_q ? 1 : p.batch},
                           box_rows / group, 8 * group, 2, BoxLayout::plain);
  }

 private:
  // Until dQ is written, its memory holds the statistics: of each group of kDim / 8 rows the first row has 16 bytes for
  // each. A query block, which must consist of whole groups, is written by its last visitor, when all have read them;
  // where nobody visits, clear_other_gradients, which therefore comes last, makes zeros of them.
  static constexpr int kGroup = Config::kDim / 8, kGroupBits = kGroup == 8 ? 3 : 4;
  static bool keeps_statistics_in_dq(const BackwardProblem& p) {
    if constexpr (Config::kSeparate || Config::kRows % kGroup != 0 || kGroup != 1 << kGroupBits)
      return false;
    else
      return p.head_dim == Config::kDim && !p.cu_seqlens_q && !p.seqused_q && p.max_seqlen_q % kGroup == 0;
  }
  static int64_t rows_of(const BackwardProblem& p) { return p.cu_seqlens_q ? p.total_q : p.max_seqlen_q; }
  static int64_t key_blocks_of(const BackwardProblem& p) {
    return p.cu_seqlens_k ? packed_key_blocks(p).size() : ceil_div(p.max_seqlen_k, int64_t{Config::kKeys});
  }
  static int64_t key_turns(const BackwardProblem& p) {
    return shared_key_blocks(p) * 4 * Config::kWarpgroups * (Config::kSeparate ? 2 : 1);
  }
  static int64_t key_counters(const BackwardProblem& p) {
    const int64_t waves = may_go_round(p) ? (p.cu_seqlens_k ? 1 : p.batch) * p.heads * key_blocks_of(p) : 0;
    return key_turns(p) + waves + (Config::kSeparate ? kGradientKernels : 0);
  }
};

}  // namespace fae::sm90
