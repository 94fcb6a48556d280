#include "../cuda/delta.h"
#include "../cuda/launch.h"
#include "../cuda/single_term.h"
#include "../sm80/kernels.h"
#include "backward_movers.h"
#include "backward_separate.h"
#include "backward_space.h"
#include "backward_terms.h"
#include "backward_wide.h"
#include "kernels.h"

// Backward attention by recomputation (FlashAttention-2, arXiv 2307.08691, algorithm 2) with wgmma:
//   P = exp(S - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = dS K,  dK = dS^T Q.
// Thread blocks stay and take one task after the other, a block of keys for a query head or several. Each of two
// warpgroups has 64 of the keys, with their dK and dV in registers, and meets the query blocks that see them one by one
// ("steps"). Scores are computed transposed, keys by rows: P^T and dS^T are then left operands of dV and dK in the
// registers that they come in, and dS passes through shared memory for dQ only. (Head dims beyond 128 leave no
// registers for that: backward_separate.h, and backward_wide.h where scores have terms.)
//
// -lse / scale and -delta are added to S and dP by the tensor cores, as one step more of those products (cuda/delta.h):
// read by the threads that need them, they would cost a tenth of the time.
//
// A term of the scores that comes alone has a kernel of its own; one for all others takes lse and delta by themselves
// (backward_terms.h).
//
// dQ of a step is computed during the next step, when dS of both warpgroups is there without anybody having waited for
// it. It grows in global memory in the order of the visits, as in sm80/backward.cu: the first visitor stores, others
// add, the last one writes the result.

namespace fae::sm90 {
namespace {

// A warpgroup that computes.
template <class T, class Config, Terms kTerms>
class BackwardComputer {
  using Memory = BackwardMemory<T, Config>;
  using Buffers = typename Memory::Buffers;
  using QueryBuffers = typename Memory::QueryBuffers;
  using Scores = cuda::TransposedAccumulator<Config::kRows / 8, 1>;  // transpose: 64 keys by kRows
  using Fragments = uint32_t[Config::kRows / 16][4];
  static constexpr int ND = Config::kDim / 8, NQ = Config::kQueryRows / 8;
  // What products bring with them.
  static constexpr bool kFoldsLse = kTerms != Terms::softcap && kTerms != Terms::any;
  static constexpr bool kFoldsDelta = kTerms != Terms::any;
  static constexpr bool kPacksEarly = kTerms == Terms::softcap || kTerms == Terms::any;  // P

 public:
  __device__ BackwardComputer(const BackwardCall& call, const Memory& memory, int warp)
      : call_(call),
        p_(call.p),
        memory_(memory),
        warpgroup_(warp / 4),
        warp_row_(warp % 4 * 16),
        scale_log2_(call.constants.scale * cuda::kLog2e) {}

  __device__ __forceinline__ void run() {
    for_each_key_block(memory_, [&](const KeyBlock& keys) __attribute__((always_inline)) {
      dk_.fill(0);
      dv_.fill(0);
      if (keys.steps > 0) walk(keys.steps);
      finish();
    });
  }

 private:
  // All query blocks of a key block.
  __device__ __forceinline__ void walk(int steps) {
    wait_for_q(step_);
    start_scores();
    wait(memory_.v_full(), v_block_++ % 2);
    wait(memory_.dout_full(stage()), parity());
    start_dprob();
    if constexpr (kTerms == Terms::any) {
      // One copy of what all terms take. Kernels for fewer have no registers for a loop like this.
#pragma unroll 1
      for (int left = steps - 1;; --left) {
        finish_scores();
        if (left == 0) break;
        if (left == steps - 1)
          step<true, false>();
        else
          step<false, false>();
      }
      if (steps == 1) return step<true, true>();
    } else {
      finish_scores();
      if (steps == 1) return step<true, true>();
      step<true, false>();
      finish_scores();
#pragma unroll 1
      for (int left = steps - 2; left > 0; --left) {
        step<false, false>();
        finish_scores();
      }
    }
    step<false, true>();
  }

  // From P and dP of one step to the products for those of the next.
  template <bool kFirst, bool kLast>
  __device__ __forceinline__ void step() {
    Fragments p, ds;
    take_fragments(p, ds);
    store_ds(ds);
    if constexpr (!kFirst) start_dq(step_ - 1);
    fence_registers(p);
    fence_registers(ds);
    fence_registers(dv_.x[0]);
    fence_registers(dk_.x[0]);
    begin_products();
    multiply_transposed(dv_, p, memory_.dout(stage()));
    begin_products();
    multiply_transposed(dk_, ds, memory_.q(q_stage()));
    commit_products();
    // Loads and barriers wait behind what is added to dQ: all that the next scores need is looked at before.
    if constexpr (!kLast) wait_for_q(step_ + 1);
    if constexpr (!kFirst) {
      wait_for_dq(step_ - 1);
      finish_dq(step_ - 1);
    }
    if constexpr (kLast) {
      wait_products<0>();
      finish_gradients(step_);
      start_dq(step_);
      wait_products<0>();
      release(memory_.keys_empty());  // the next K and V come while dQ waits for its turn, and dK and dV leave
      wait_for_turn(memory_, step_);
      finish_dq(step_);
      ++step_;
    } else {
      ++step_;
      start_scores();
      // The registers of dQ are in use until it has been added: this keeps the compiler from waiting for that earlier.
      if constexpr (!kFirst && !Config::kSharesDim) fence_registers(dq_.x[0]);
      wait_products<1>();
      finish_gradients(step_ - 1);
      wait(memory_.dout_full(stage()), parity());
      start_dprob();
    }
  }

  // dV and dK, as far as step `number` adds to them.
  __device__ __forceinline__ void finish_gradients(unsigned number) {
    fence_registers(dv_.x[0]);
    fence_registers(dk_.x[0]);
    release(memory_.dout_empty(Buffers::stage(number)));
    release(memory_.q_empty(QueryBuffers::stage(number)));
  }

  __device__ __forceinline__ void wait_for_q(unsigned number) const {
    wait(memory_.q_full(QueryBuffers::stage(number)), QueryBuffers::parity(number));
  }

  // S^T = K Q^T - lse / scale and dP^T = V dO^T - delta, or S^T and dP^T alone.
  __device__ __forceinline__ void start_scores() {
    const Memory memory = memory_.unknown();
    begin_products();
    start_folded<kFoldsLse>(scores_.transpose, memory.lse_selector(), memory.k(warpgroup_), memory.q(q_stage()),
                            memory_.statistics(q_stage()));
  }
  __device__ __forceinline__ void start_dprob() {
    const Memory memory = memory_.unknown();
    begin_products();
    start_folded<kFoldsDelta>(dprob_.transpose, memory.delta_selector(), memory.v(warpgroup_), memory.dout(stage()),
                              memory_.statistics(q_stage()));
  }

  // P while dP is computed, and the end of that.
  __device__ __forceinline__ void finish_scores() {
    if constexpr (kTerms == Terms::any) return finish_general_scores();
    constexpr bool kNeedsPlace = kTerms == Terms::alibi || kTerms == Terms::dropout;  // of every score
    const bool is_edge = !kNeedsPlace && read_struct<Step>(memory_.step(step_)).is_edge(warpgroup_);
    wait_products<1>();
    fence_registers(scores_.transpose.x[0]);
    if constexpr (kTerms == Terms::softcap) cuda::cap_scores<T>(scores_, call_.constants);
    apply_overlay();
    if (kNeedsPlace || is_edge) {
      const Step step = read_struct<Step>(memory_.step(step_));
      const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
      const int row = step.row_begin, key = keys.key_begin + warpgroup_ * kWarpgroupRows + warp_row_;
      if (!kNeedsPlace || step.is_edge(warpgroup_))
        cuda::mask_band(scores_, keys.band, row, key,
                        kTerms == Terms::softcap ? kHiddenCapped : minus_infinity<float>());
      if constexpr (kTerms == Terms::alibi)
        cuda::Alibi(scores_, alibi_slope(p_, keys.batch, step.head) * cuda::kLog2e,
                    row + keys.band.seqlen_k - keys.band.seqlen_q - key)
            .add(scores_, scale_log2_);
      if constexpr (kTerms == Terms::dropout) {
        exponentiate(scores_, scale_log2_);
        mark_dropped(scores_, cuda::ScoreTerms<T>(p_, call_.constants, keys.batch, step.head, keys.band), row, key);
      }
    }
    if constexpr (kTerms == Terms::none || kTerms == Terms::mask) exponentiate(scores_, scale_log2_);
    if constexpr (kTerms == Terms::alibi || kTerms == Terms::bias) exponentiate(scores_, 1.0f);
    if constexpr (kTerms == Terms::softcap) exponentiate_capped(scores_);
    // A wait here keeps the compiler from moving the one for the products before the exponentials.
    fence_registers(scores_.transpose.x[0]);
    wait(memory_.ds_empty(stage()), parity() ^ 1);
    wait_products<0>();
    fence_registers(dprob_.transpose.x[0]);
  }

  __device__ __forceinline__ void apply_overlay() {
    if constexpr (Memory::kHasOverlay) {
      const bool one_row = overlay_of<kTerms>(p_).size_row == 1;
      for_each_transposed_element(memory_.overlay(stage()), warpgroup_ * kWarpgroupRows + warp_row_, one_row,
                                  [&](int m, int half, int e, auto element) {
                                    float& x = scores_.at(m, half, 0, e);
                                    if constexpr (kTerms == Terms::bias)
                                      x = fmaf(x, scale_log2_, cuda::as_float(element) * cuda::kLog2e);
                                    else if (element == 0)
                                      x = minus_infinity<float>();
                                  });
    }
  }

  // What is hidden of capped scores: far enough below all caps that there are (SoftcapSeries::holds) for P to be 0, and
  // not so far that the square, in units of the smallest cap's, would be infinite: 0 times that is NaN.
  static constexpr float kHiddenCapped = -1e4f;
  // P, which leaves at once, of capped scores; what dS needs of it takes their place. Such scores are small, and so is
  // what rounding adds to the logarithm of P.
  __device__ __forceinline__ void exponentiate_capped(Scores& scores) {
    using Part = cuda::PlacedAccumulator<2, 1>;
    const float cap_log2 = call_.constants.softcap * cuda::kLog2e, inverse_square = -1 / (cap_log2 * cap_log2);
#pragma unroll
    for (int k = 0; k < Config::kRows / 16; ++k) {
      Part prob;
      prob.lane = opaque(lane_index());
      Part::for_each_row([&](int m, int half) {
        const float lse = folded_statistic(memory_.statistics(q_stage()), 16 * k + prob.row(m, half), 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores.at(2 * k + m, half, 0, e);
          const float p = cuda::exp2_approx(fmaf(lse, scale_log2_, x));
          prob.at(m, half, 0, e) = p;
          x = p * fmaf(x * x, inverse_square, 1.0f);
        }
      });
      copy(sm80::as_left_operand<T>(prob.transpose, 0, 0), p_fragments_[k]);
    }
  }

  // Dropped probabilities become negative.
  __device__ __forceinline__ void mark_dropped(Scores& scores, const cuda::ScoreTerms<T>& terms, int row,
                                               int key) const {
    terms.for_each_dropout_call(scores, row, key, [&](int i, int k, const uint32_t (&words)[4]) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t dropped = ~cuda::kept_halves(words[r], call_.constants.threshold);
        cuda::for_each_in_register<Scores>(i, k, r, [&](int b, int m, int half, int n, int e) {
          float& x = scores.at(m, half, n, e);
          x = __uint_as_float(__float_as_uint(x) | ((b == 0 ? dropped << 16 : dropped) & 0x80000000u));
        });
      }
    });
  }
  // P and dS of those, both without the weight of what is kept, which comes with the results: dS = P (dP - delta) where
  // a probability is kept, otherwise -P delta. Delta, too, is divided by that weight.
  __device__ __forceinline__ void finish_dropout() {
    scores_.for_each_row([&](int m, int half) {
      const float minus_delta =
          folded_statistic(memory_.statistics(q_stage()), 8 * m + opaque(lane_index()) % 4 * 2 + half, 1);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &p = scores_.at(m, half, 0, e), &ds = dprob_.at(m, half, 0, e);
        ds = fabsf(p) * (p < 0 ? minus_delta : ds);
        p = fmaxf(p, 0.0f);
      }
    });
  }

  // P and dS at once, the first parts' P (Config::kEarlyParts) while dP is computed.
  __device__ __forceinline__ void finish_general_scores() {
    constexpr int kParts = Config::kRows / 16, kEarlyParts = Config::kEarlyParts;
    wait_products<1>();
    fence_registers(scores_.transpose.x[0]);
    const Step step = read_struct<Step>(memory_.step(step_));
    const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
    const GeneralScores<T> general(call_, keys, step.head, step.is_edge(warpgroup_), step.row_begin,
                                   keys.key_begin + warpgroup_ * kWarpgroupRows + warp_row_,
                                   memory_.statistics(q_stage()));
    const auto finish = [&](int k) {
      const auto on_gradient = [&](const auto& ds) {
        if (call_.direct_dbias) write_dbias(call_, memory_, step_, 16 * k, warpgroup_ * kWarpgroupRows + warp_row_, ds);
      };
      copy(general.finish(dprob_, scores_, k, call_.constants, memory_.statistics(q_stage()), on_gradient),
           ds_fragments_[k]);
    };
#pragma unroll
    for (int k = 0; k < kEarlyParts; ++k) copy(general.compute(scores_, k), p_fragments_[k]);
    fence_registers(scores_.transpose.x[0]);
    wait(memory_.ds_empty(stage()), parity() ^ 1);
    wait_products<0>();
    fence_registers(dprob_.transpose.x[0]);
#pragma unroll
    for (int k = 0; k < kEarlyParts; ++k) finish(k);
#pragma unroll
    for (int k = kEarlyParts; k < kParts; ++k) {
      copy(general.compute(scores_, k), p_fragments_[k]);
      finish(k);
    }
  }

  // P and dS as left operands.
  __device__ __forceinline__ void take_fragments(Fragments& p, Fragments& ds) {
    if constexpr (kTerms == Terms::dropout)
      finish_dropout();
    else if constexpr (kTerms != Terms::any)
      scores_.for_each([&](int m, int half, int n, int e) { dprob_.at(m, half, n, e) *= scores_.at(m, half, n, e); });
    if constexpr (kTerms == Terms::any)
      memcpy(ds, ds_fragments_, sizeof(ds));
    else
      pack(dprob_, ds);
    if constexpr (kPacksEarly)
      memcpy(p, p_fragments_, sizeof(p));
    else
      pack(scores_, p);
  }
  __device__ __forceinline__ static void pack(const Scores& x, Fragments& fragments) {
#pragma unroll
    for (int k = 0; k < Config::kRows / 16; ++k) copy(sm80::as_left_operand<T>(x.transpose, 0, k), fragments[k]);
  }
  __device__ __forceinline__ static void copy(const sm80::FragmentA<T>& from, uint32_t (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from.x[i];
  }

  // dS, rows by keys, to where both warpgroups find it.
  __device__ __forceinline__ void store_ds(const Fragments& ds) const {
    const int lane = opaque(lane_index());
    const uint32_t first = memory_.ds(stage()).address(lane / 16 * 8 + lane % 8,
                                                       warpgroup_ * kWarpgroupRows + warp_row_ + lane / 8 % 2 * 8);
#pragma unroll
    for (int k = 0; k < Config::kRows / 16; ++k) store_matrices_transposed(first + k * 16 * cuda::kSwizzleBytes, ds[k]);
    fence_async_proxy();
    release(memory_.ds_full(stage()));
  }

  // ---- dQ -----------------------------------------------------------------------------------------------------------

  // This warpgroup's share of dQ^T, an accumulator of 64 columns of dQ by kQueryRows of the rows. Where it is as large
  // as S, it takes the registers of S: otherwise the compiler finds too few for it beside the fragments, which fit into
  // those of dP.
  using QueryGradient = Accumulator<1, NQ>;
  __device__ __forceinline__ QueryGradient& dq() {
    if constexpr (Config::kSharesDim)
      return scores_.transpose;
    else
      return dq_;
  }
  __device__ __forceinline__ int dq_row() const { return Config::kSharesDim ? 0 : warpgroup_ * Config::kQueryRows; }
  __device__ __forceinline__ int dq_col() const { return Config::kSharesDim ? warpgroup_ * 64 : 0; }

  // dQ^T = K^T dS^T.
  __device__ __forceinline__ void start_dq(unsigned number) {
    using DS = typename Memory::DS;
    constexpr int kKeySteps = kWarpgroupRows / 16;
    const int buffer = Buffers::stage(number);
    wait(memory_.ds_full(buffer), Buffers::parity(number));
    const Memory memory = memory_.unknown();
    const Descriptor ds(memory.ds(buffer).address(dq_row(), 0)), keys(memory.k(0).address(0, dq_col()));
    begin_products();
#pragma unroll
    for (int k = 0; k < Config::kKeys / 16; ++k)
      multiply_async<true>(dq().x[0],
                           keys.at(k / kKeySteps * Memory::K::kBytes + k % kKeySteps * 16 * cuda::kSwizzleBytes),
                           ds.at(k / kKeySteps * DS::kRows * cuda::kSwizzleBytes + k % kKeySteps * 32), k > 0, T{});
    commit_products();
  }

  // Until it is computed, all but the products started last are done, and it is its turn. Beside ALiBi there is no
  // register for looking at the turn before.
  __device__ __forceinline__ void wait_for_dq(unsigned number) const {
    if constexpr (kTerms != Terms::alibi) wait_for_turn(memory_, number);
    wait_products<1>();
    if constexpr (kTerms == Terms::alibi) wait_for_turn(memory_, number);
  }

  __device__ __forceinline__ void finish_dq(unsigned number) {
    fence_registers(dq().x[0]);
    release(memory_.ds_empty(Buffers::stage(number)));
    const Step step = read_struct<Step>(memory_.step(number));
    // The warpgroups' pieces of the same rows lie side by side.
    constexpr int kStep = Config::kSharesDim ? Config::kWarpgroups : 1;
    visit_dq<Config, kStep>(call_, dq(), step, warpgroup_ * (Config::kSharesDim ? 1 : NQ),
                            [&](const QueryGradient& sum) { write_dq(sum, step); });
    release(memory_.added(number));
  }

  __device__ __forceinline__ void write_dq(const QueryGradient& dq, const Step& step) const {
    const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
    const float scale = score_weight();
    const int lane = lane_index(), begin = step.row_begin + dq_row();
    T* const rows = row_ptr<T>(p_.dq, keys.batch, keys.q_start + begin, step.head);
#pragma unroll
    for (int n = 0; n < NQ; n += 4)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Eight columns of eight rows, transposed so that a quad has a row; then a lane has all that the quad has of
        // one of four rows.
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && n + i < NQ; ++i)
          words[i] =
              transpose_matrix(sm80::pack(dq.x[0][n + i][2 * half] * scale, dq.x[0][n + i][2 * half + 1] * scale, T{}));
        const uint4 chunk = sm80::quad_transpose(words);
        const int number = n + lane % 4, row = 8 * number + lane / 4, col = dq_col() + warp_row_ + 8 * half;
        if (number < NQ && static_cast<unsigned>(begin + row) < static_cast<unsigned>(keys.band.seqlen_q) &&
            col < static_cast<int>(p_.head_dim))
          *reinterpret_cast<uint4*>(rows + row * p_.dq.stride_row + col) = chunk;
      }
  }

  // ---- The end of a key block ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish() {
    const KeyBlock keys = read_struct<KeyBlock>(memory_.key_block());
    release(memory_.key_block_empty());
    const int begin = keys.key_begin + warpgroup_ * kWarpgroupRows + warp_row_, rows = keys.band.seqlen_k - begin;
    const int dk_piece = 2 * warpgroup_ * ND, dv_piece = dk_piece + ND;
    const auto leave_both = [&](float* partial) {
      leave(partial, dk_piece, dk_, keys.rank());
      leave(partial, dv_piece, dv_, keys.rank());
    };
    const auto write_both = [&](float* partial) {
      collect(partial, dk_piece, dk_, keys.rank());
      collect(partial, dv_piece, dv_, keys.rank());
      const int col = opaque(0);  // so that the lanes' columns don't take registers from the main loop
      sm80::write_rows<T>(dk_, p_.dk, keys.batch, keys.k_start + begin, keys.head_kv, rows, col,
                          static_cast<int>(p_.head_dim), score_weight());
      sm80::write_rows<T>(dv_, p_.dv, keys.batch, keys.k_start + begin, keys.head_kv, rows, col,
                          static_cast<int>(p_.head_dim_v), kept_weight());
    };
    visit_keys<Config>(call_, keys, 4 * warpgroup_ + warp_row_ / 16, leave_both, write_both);
  }

  // What P and dS are multiplied by, in the end.
  __device__ __forceinline__ float kept_weight() const {
    return kTerms == Terms::dropout ? call_.constants.kept_weight : 1.0f;
  }
  __device__ __forceinline__ float score_weight() const { return static_cast<float>(p_.softmax_scale) * kept_weight(); }

  __device__ __forceinline__ int stage() const { return Buffers::stage(step_); }
  __device__ __forceinline__ int q_stage() const { return QueryBuffers::stage(step_); }
  __device__ __forceinline__ uint32_t parity() const { return Buffers::parity(step_); }

  const BackwardCall& call_;
  const BackwardProblem& p_;
  const Memory memory_;
  const int warpgroup_, warp_row_;  // the warp's keys begin at warp_row_ of the warpgroup's
  const float scale_log2_;
  unsigned step_ = 0, v_block_ = 0;
  Scores scores_, dprob_;
  Fragments p_fragments_, ds_fragments_;
  QueryGradient dq_;
  Accumulator<1, ND> dk_, dv_;
};

template <class T, class Config, Terms kTerms>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_kernel(const __grid_constant__ BackwardCall call) {
  using Memory = BackwardMemory<T, Config>;
  const Memory memory{sm80::shared_offset(sm80::dynamic_shared_memory())};
  if (threadIdx.x < 64) init_selectors(memory.lse_selector(), static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&call.q, &call.k, &call.v, &call.dout, &call.statistics}) prefetch(*map);
    if (Memory::kHasOverlay) prefetch(call.overlay);
    memory.init_barriers();
  }
  __syncthreads();
  wait_for_previous();
  const int warp = uniform(warp_index());
  if (warp < 4) {
    give_registers_back<Config::kMoverRegisters>();
    if (warp == 0) BackwardLoader<T, Config>(call, memory).run();
    if (warp == 1 && lane_index() == 0) wait_for_turns(call, memory);
    if (warp == 2 && lane_index() == 0) pass_turns_on(call, memory);
    if constexpr (Memory::kStoresDbias)
      if (warp == 3 && lane_index() == 0) store_dbias(call, memory);
  } else {
    take_registers<Config::kComputeRegisters>();
    using Computer =
        std::conditional_t<Config::kWide, WideBackwardComputer<T, Config>, BackwardComputer<T, Config, kTerms>>;
    Computer(call, memory, warp - 4).run();
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------

template <class T, class Config, Terms kTerms>
void run_shared_kernel(const BackwardProblem& p, const BackwardSpace<Config>& space, const cuda::TaskOrder& order,
                       const Execution& execution) {
  using Memory = BackwardMemory<T, Config>;
  const bool direct_dbias = space.writes_dbias(p);
  if (space.sums_dbias(p)) bias_gradient<FAE_HEAD_DIM>(p, space.bias_gradient, execution.stream);

  const cuda::Tasks tasks(p, order, space);
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q, batch_q = p.cu_seqlens_q ? 1 : p.batch;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  const auto map = [&](const TensorView& view, int64_t cols, int64_t rows, int64_t heads, int64_t batch, int box_rows) {
    return make_tensor_map(p.dtype, view, {cols, rows, heads, batch}, box_rows);
  };
  BackwardCall call{p,
                    tasks,
                    PackedBlocks(p.cu_seqlens_q, p.batch, p.total_q, Config::kPlaceRows),
                    space.packed_key_blocks(p),
                    static_cast<int>(space.query_blocks),
                    static_cast<int>(space.key_blocks),
                    space.ticket(),
                    space.turns(),
                    space.dq_partial,
                    space.waves(p),
                    space.others(),
                    space.dkv_partial,
                    cuda::ScoreConstants(p),
                    direct_dbias,
                    map(p.q, p.head_dim, rows_q, p.heads, batch_q, Config::kRows),
                    map(p.k, p.head_dim, rows_k, p.heads_kv, batch_k, kWarpgroupRows),
                    map(p.v, p.head_dim_v, rows_k, p.heads_kv, batch_k, kWarpgroupRows),
                    map(p.dout, p.head_dim_v, rows_q, p.heads, batch_q, Config::kRows),
                    space.statistics_map(p, Config::kRows),
                    {},
                    {},
                    space.statistics.group_bits};
  if constexpr (Memory::kHasOverlay)
    call.overlay = make_tensor_map<typename Memory::Overlay>(p.dtype, overlay_of<Config::kOverlay>(p));
  if constexpr (Memory::kStoresDbias)
    if (direct_dbias) call.dbias = make_tensor_map<typename Memory::DS>(p.dtype, p.dbias);
  const int64_t blocks = std::min<int64_t>(tasks.most(), cuda::multiprocessors());
  const cuda::Grid grid{
      .blocks = blocks, .threads = Config::kThreads, .shared_bytes = Memory::kBytes, .overlaps = true, .waits = true};
  cuda::launch("sm90 backward", backward_kernel<T, Config, kTerms>, grid, execution.stream, call);
}

template <class T, Terms kTerms>
void run_backward(const BackwardProblem& problem, const Execution& execution) {
  using Config = BackwardConfig<FAE_HEAD_DIM, kTerms>;
  const BackwardSpace<Config> space(problem, execution.workspace);
  cuda::RowStatistics statistics = space.statistics;
  statistics.folded = kTerms != Terms::any;
  if (kTerms == Terms::dropout) statistics.delta_weight = static_cast<float>(1 - problem.dropout_p);
  cuda::TaskOrder order;
  if constexpr (!Config::kSeparate) {
    order = cuda::task_order<T, Config>(problem.heads, problem.heads / problem.heads_kv, cuda::multiprocessors());
    order.even = !problem.uneven();
    order.alternates = !space.may_go_round(problem);
    order.rounds = space.rounds(problem);
  }
  const BackwardProblem p = cuda::prepare_backward(problem, space, statistics, order, execution);
  if (p.dsinks) cuda::compute_dsinks(p, execution);
  if constexpr (Config::kSeparate)
    run_separate_kernels<T, FAE_HEAD_DIM>(p, space, execution);
  else
    run_shared_kernel<T, Config, kTerms>(p, space, order, execution);
}

// lse / scale, which is added to products, has to be a float.
constexpr double kSmallestScale = 1e-30;

// f(std::integral_constant) with the terms that a call's kernel is made for.
template <class F>
auto with_kernel_terms(const BackwardProblem& p, F&& f) {
  using Any = std::integral_constant<Terms, Terms::any>;
  if (p.softmax_scale < kSmallestScale) return f(Any{});
  return cuda::with_terms(p, [&](auto terms) {
    if constexpr (BackwardConfig<FAE_HEAD_DIM, terms()>::kWide)
      return f(Any{});
    else if (terms() == Terms::bias && !(readable(p.bias, 2) && (!p.dbias.data || readable(p.dbias, 2))))
      return f(Any{});
    else if (terms() == Terms::mask && !readable(p.mask, 1))
      return f(Any{});
    else
      return f(terms);
  });
}

}  // namespace

template <>
size_t backward_workspace<DType::FAE_DTYPE, FAE_HEAD_DIM>(const BackwardProblem& p) {
  return with_kernel_terms(
      p, [&](auto terms) { return BackwardSpace<BackwardConfig<FAE_HEAD_DIM, terms()>>(p, nullptr).bytes; });
}

template <>
void backward<DType::FAE_DTYPE, FAE_HEAD_DIM>(const BackwardProblem& p, const Execution& execution) {
  with_kernel_terms(p, [&](auto terms) { run_backward<ElementOf<DType::FAE_DTYPE>, terms()>(p, execution); });
}

}  // namespace fae::sm90
