#pragma once

#include "backward_terms.h"
#include "backward_visit.h"

// A warpgroup of the backward that computes, for head dims beyond 128 where scores have terms (backward.cu says what is
// computed, backward_terms.h how). dK and dV of 64 keys fill its registers. So both warpgroups of a thread block work
// on the same 64 keys:
//   - each computes the scores of half of the rows of a step, and leaves P^T and dS^T, keys by rows, in shared memory;
//   - then the first one has all of dV += P^T dO, the second one all of dK += dS^T Q, and each half of the columns of
//     dQ = dS K.
// Scores of the next step are computed while the warpgroups wait for each other.

namespace fae::sm90 {

template <class T, class Config>
class WideBackwardComputer {
  using Memory = BackwardMemory<T, Config>;
  using Buffers = typename Memory::Buffers;
  static_assert(Config::kStagesQ == Config::kStages);
  using Scores = cuda::TransposedAccumulator<Config::kScoreRows / 8, 1>;  // transpose: 64 keys by kScoreRows
  static constexpr int ND = Config::kDim / 8, NQ = Config::kQueryCols / 8;

 public:
  __device__ WideBackwardComputer(const BackwardCall& call, const Memory& memory, int warp)
      : call_(call), p_(call.p), memory_(memory), warpgroup_(warp / 4), warp_row_(warp % 4 * 16) {}

  __device__ __forceinline__ void run() {
    for_each_key_block(memory_, [&](const KeyBlock& keys) {
      gradient_.fill(0);
      if (keys.steps > 0) walk(keys.steps);
      finish();
    });
  }

 private:
  // All query blocks of a key block.
  __device__ __forceinline__ void walk(int steps) {
    start_scores(step_);
    wait(memory_.v_full(), v_block_++ % 2);
    wait_for_dout(step_);
    start_dprob(step_);
    wait_products<1>();
    finish_scores(step_);
    wait_products<0>();
    fence_registers(dprob_.transpose.x[0]);
#pragma unroll 1
    for (; steps > 1; --steps) step<false>();
    step<true>();
  }

  // From P and dP of one step to those of the next.
  template <bool kLast>
  __device__ __forceinline__ void step() {
    store_scores();
    if constexpr (!kLast) start_scores(step_ + 1);
    wait(memory_.ds_full(stage()), Buffers::parity(step_));
    start_gradient();
    Accumulator<1, kFirstCols / 8> first;
    Accumulator<1, kMoreCols / 8> more;
    start_dq(first, first_col());
    start_dq(more, more_col());
    if constexpr (!kLast) wait_for_dout(step_ + 1);
    wait_products<2>();
    fence_registers(gradient_.x[0]);
    release(memory_.q_empty(stage()));
    release(memory_.dout_empty(stage()));
    wait_for_turn(memory_, step_);
    wait_products<1>();
    finish_dq(first, warpgroup_ * NQ, first_col());
    if constexpr (!kLast) start_dprob(step_ + 1);
    if constexpr (!kLast) finish_scores(step_ + 1);  // now that there are registers for it
    wait_products<kLast ? 0 : 1>();
    if constexpr (kLast) release(memory_.keys_empty());
    finish_dq(more, warpgroup_ * NQ + kFirstCols / 8, more_col());
    release(memory_.added(step_));
    if constexpr (!kLast) {
      wait_products<0>();
      fence_registers(dprob_.transpose.x[0]);
    }
    ++step_;
  }

  // S^T = K Q^T and dP^T = V dO^T, of this warpgroup's rows.
  __device__ __forceinline__ void start_scores(unsigned number) {
    const int stage = Buffers::stage(number);
    wait(memory_.q_full(stage), Buffers::parity(number));
    const Memory memory = memory_.unknown();
    start_product(scores_, memory.k(0), memory.q(stage));
  }
  __device__ __forceinline__ void wait_for_dout(unsigned number) const {
    wait(memory_.dout_full(Buffers::stage(number)), Buffers::parity(number));
  }
  __device__ __forceinline__ void start_dprob(unsigned number) {
    const Memory memory = memory_.unknown();
    start_product(dprob_, memory.v(0), memory.dout(Buffers::stage(number)));
  }
  __device__ __forceinline__ void start_product(Scores& s, const typename Memory::K& keys,
                                                const typename Memory::Q& rows) const {
    begin_products();
    multiply_straight(s.transpose, keys, rows, false, score_row());
    commit_products();
  }

  // P, which leaves at once; what dS needs of it remains.
  __device__ __forceinline__ void finish_scores(unsigned number) {
    fence_registers(scores_.transpose.x[0]);
    const Step step = read_struct<Step>(memory_.step(number));
    const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
    const int stage = Buffers::stage(number);
    const GeneralScores<T> general(call_, keys, step.head, step.is_edge(0), step.row_begin + score_row(),
                                   keys.key_begin + warp_row_, statistics(stage));
#pragma unroll
    for (int k = 0; k < Config::kScoreRows / 16; ++k) {
      const sm80::FragmentA<T> p = general.compute(scores_, k);
      const int lane = opaque(lane_index());
      store_matrices((exchanged(stage, lane) ^ exchanged_chunk(k, lane)) + Memory::DS::kBytes, p.x);
    }
    // The wait for a barrier that follows keeps the compiler from taking the exponentials after the products.
    fence_registers(scores_.transpose.x[0]);
  }

  // dS^T to where both warpgroups find it. That of two steps before is no longer needed: the other warpgroup, too, has
  // been seen to store that of one step before.
  __device__ __forceinline__ void store_scores() {
    const int lane = opaque(lane_index());
    const uint32_t first = exchanged(stage(), lane);
#pragma unroll
    for (int k = 0; k < Config::kScoreRows / 16; ++k) {
      const auto on_gradient = [&](const auto& part) {
        if (call_.direct_dbias) write_dbias(call_, memory_, step_, score_row() + 16 * k, warp_row_, part);
      };
      store_matrices(first ^ exchanged_chunk(k, lane),
                     GeneralScores<T>::finish(dprob_, scores_, k, call_.constants, statistics(stage()), on_gradient).x);
    }
    fence_async_proxy();
    release(memory_.ds_full(stage()));
  }
  // Where a lane stores its part of dS^T: this, with the bits of 16 rows exchanged.
  __device__ __forceinline__ uint32_t exchanged(int stage, int lane) const {
    return memory_.ds(stage).address(warp_row_ + lane % 16, 0);
  }
  __device__ __forceinline__ uint32_t exchanged_chunk(int k, int lane) const {
    return ((score_row() + 16 * k) / 8 + lane / 16) * 16;
  }

  // dV += P^T dO or dK += dS^T Q.
  __device__ __forceinline__ void start_gradient() {
    const Memory memory = memory_.unknown();
    fence_registers(gradient_.x[0]);
    begin_products();
    multiply_transposed(gradient_, typename Memory::DS{has_dk() ? memory.ds(stage()).base : memory.p(stage()).base},
                        typename Memory::Q{has_dk() ? memory.q(stage()).base : memory.dout(stage()).base});
    commit_products();
  }

  // ---- dQ -----------------------------------------------------------------------------------------------------------

  // This warpgroup's columns: 64 of the first 128, and half of the others. Half of the sum is added to what others have
  // left while the other half is computed.
  static constexpr int kFirstCols = 64, kMoreCols = Config::kQueryCols - kFirstCols;
  __device__ __forceinline__ int first_col() const { return warpgroup_ * kFirstCols; }
  __device__ __forceinline__ int more_col() const { return 2 * kFirstCols + warpgroup_ * kMoreCols; }

  // dQ = dS K, columns from `col` on.
  template <int N>
  __device__ __forceinline__ void start_dq(Accumulator<1, N>& dq, int col) const {
    const Memory memory = memory_.unknown();
    const Descriptor ds(memory.ds(stage()).base), keys(memory.k(0).address(0, col));
    begin_products();
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k)
      multiply_async<true, true>(dq.x[0], ds.at(k * 16 * cuda::kSwizzleBytes), keys.at(k * 16 * cuda::kSwizzleBytes),
                                 k > 0, T{});
    commit_products();
  }

  template <int N>
  __device__ __forceinline__ void finish_dq(Accumulator<1, N>& dq, int piece, int col) const {
    fence_registers(dq.x[0]);
    const Step step = read_struct<Step>(memory_.step(step_));
    visit_dq<Config>(call_, dq, step, piece, [&](const Accumulator<1, N>& sum) {
      const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
      const int begin = step.row_begin + warp_row_;
      sm80::write_rows<T>(sum, p_.dq, keys.batch, keys.q_start + begin, step.head, keys.band.seqlen_q - begin, col,
                          static_cast<int>(p_.head_dim), static_cast<float>(p_.softmax_scale));
    });
  }

  // ---- The end of a key block ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish() {
    const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
    release(memory_.key_block_empty());
    const int begin = keys.key_begin + warp_row_;
    const int piece = warpgroup_ * ND;
    const auto leave_it = [&](float* partial) { leave(partial, piece, gradient_, keys.rank()); };
    const auto write_it = [&](float* partial) {
      collect(partial, piece, gradient_, keys.rank());
      sm80::write_rows<T>(gradient_, has_dk() ? p_.dk : p_.dv, keys.batch, keys.k_start + begin, keys.head_kv,
                          keys.band.seqlen_k - begin, 0, static_cast<int>(has_dk() ? p_.head_dim : p_.head_dim_v),
                          has_dk() ? static_cast<float>(p_.softmax_scale) : 1.0f);
    };
    visit_keys<Config>(call_, keys, 4 * warpgroup_ + warp_row_ / 16, leave_it, write_it);
  }

  __device__ __forceinline__ int stage() const { return Buffers::stage(step_); }
  // Of this warpgroup's first row.
  __device__ __forceinline__ uint32_t statistics(int stage) const {
    return memory_.statistics(stage) + 16 * score_row();
  }
  __device__ __forceinline__ int score_row() const { return warpgroup_ * Config::kScoreRows; }
  __device__ __forceinline__ bool has_dk() const { return warpgroup_ != 0; }

  const BackwardCall& call_;
  const BackwardProblem& p_;
  const Memory memory_;
  const int warpgroup_, warp_row_;  // the warp's keys, and its rows of dQ, begin at warp_row_ of the block's
  unsigned step_ = 0, v_block_ = 0;
  Scores scores_, dprob_;
  Accumulator<1, ND> gradient_;  // dV or dK
};

}  // namespace fae::sm90
