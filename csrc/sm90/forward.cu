#include "../cuda/launch.h"
#include "../cuda/online_softmax.h"
#include "../cuda/single_term.h"
#include "forward_movers.h"
#include "kernels.h"

// Forward attention (FlashAttention-3, arXiv 2407.08608) with wgmma. Thread blocks stay and take one block of query
// rows after the other. One warp loads Q, K and V through rings of buffers, another stores O, and each warpgroup of the
// others has 64 rows of its own from Q to O. The product of a block of keys overlaps the softmax of the one before.

namespace fae::sm90 {
namespace {

// A warpgroup that computes.
template <class T, class Config, Terms kTerms>
class Computer {
  static constexpr bool kGeneral = kTerms == Terms::any;
  // Blocks that every row sees whole keep the maximum. Not with a bias or a mask: scores far apart make few of them
  // count, and P of the largest is to be exactly 1.
  static constexpr bool kKeeps = !kGeneral && Config::kOverlay == Terms::none;
  static constexpr bool kNatural = kGeneral || kTerms == Terms::bias;  // units of scores; otherwise powers of two
  // The first product of a tile goes beside the end of the one before. Measured to help at this head dim alone.
  static constexpr bool kOverlapsTiles = Config::kDim == 128;
  static_assert(!kOverlapsTiles || Config::kStoresByCopy);  // otherwise the next Q has no place yet
  using Memory = ForwardMemory<T, Config>;
  static constexpr int N = Config::kKeys / 8, ND = Config::kDimV / 8, kSteps = Config::kKeys / 16;

 public:
  __device__ Computer(const ForwardCall& call, const Memory& memory, int warp)
      : call_(call),
        p_(call.p),
        memory_(memory),
        q_(memory.ring_q()),
        k_(memory.ring_k()),
        v_(memory.ring_v()),
        overlay_(memory.ring_overlay(warp / 4)),
        warpgroup_(warp / 4),
        warp_row_(warp % 4 * 16),
        turn_(warpgroup_ == 0 ? 1 : 0) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      q_.wait_full();
      if (work().batch < 0) return;
      if (my_blocks().empty()) {
        pass_by();
        continue;
      }
      skip(blocks_of_all().end - my_blocks().end);
      start_first_scores(q());
      finish_first_scores();
#pragma unroll 1
      while (attend()) {
      }
    }
  }

 private:
  // What is known about the tile is read anew wherever it is needed: there are no registers that could hold it.
  __device__ __forceinline__ Work work() const { return memory_.read_work(tile_); }
  __device__ __forceinline__ KeyBlocks<int> my_blocks() const { return memory_.read_blocks(tile_, warpgroup_); }
  __device__ __forceinline__ KeyBlocks<int> blocks_of_all() const {
    return memory_.read_blocks(tile_, Config::kWarpgroups);
  }
  __device__ __forceinline__ int row_begin(const Work& work) const { return row_begin_of<Config>(work, warpgroup_); }
  __device__ __forceinline__ int head(const Work& work) const { return head_of<Config>(work, warpgroup_); }
  __device__ __forceinline__ int key_begin(const Work& work, int block) const {
    if constexpr (Config::kHeads > 1) block -= work.numbered_from(warpgroup_ / Config::kHeadWarpgroups);
    return block * Config::kKeys;
  }

  // A tile of which this warpgroup's rows see nothing.
  __device__ __forceinline__ void pass_by() {
    skip(blocks_of_all().end - blocks_of_all().begin);
    release_q();
    begin();
    finish();
    end_tile();
  }
  // A tile, from S of its first block to the end. Returns whether S of the next tile's first block is there, too.
  __device__ __forceinline__ bool attend() {
    begin();
    int block = my_blocks().end - 1;
    first_step(block--);
    // In front and behind, blocks follow their maximum, in the middle they keep it. Which is faster, following by one
    // copy of the code or by two, depends on the registers that the compiler finds (docs/kernels.md).
    const auto follow_front = [&]() __attribute__((always_inline)) {
#pragma unroll 1
      for (; follows_maximum(block); --block) step<false>(block);
    };
    const auto keep_middle = [&]() __attribute__((always_inline)) {
#pragma unroll 1
      for (int left = block - my_blocks().full_begin; left >= 0; --left, --block) step<true>(block);
    };
    if constexpr (!kKeeps) {
      follow_front();
    } else if constexpr (Config::kTakesTurns) {
      follow_front();
      keep_middle();
#pragma unroll 1
      for (; block >= my_blocks().begin; --block) step<false>(block);
    } else {
#pragma unroll 1
      while (block >= my_blocks().begin) {
        follow_front();
        keep_middle();
      }
    }
    finish_blocks();
    const bool goes_on = kOverlapsTiles && next_tile_begins();
    if (goes_on) {
      start_first_scores(memory_.q(next_q().stage(), warpgroup_));
      finish();
      finish_first_scores();
    } else {
      finish();
    }
    end_tile();
    return goes_on;
  }

  __device__ __forceinline__ void begin() {
    states_ = {};
    output_.fill(0);
    if constexpr (kTerms == Terms::alibi) {
      const Work tile = work();
      slope_log2_ = alibi_slope(p_, tile.batch, tile.head) * cuda::kLog2e;
    }
  }
  __device__ __forceinline__ void end_tile() {
    if (Config::kStoresByCopy) q_.advance();
    ++tile_;
  }

  // S = Q K^T of a tile's first block.
  __device__ __forceinline__ void start_first_scores(const typename Memory::Q& q) {
    const Descriptor k = next_keys();
    k_.wait_full();
    take_turn();
    start_scores(q, k);
    pass_turn();
  }
  __device__ __forceinline__ void finish_first_scores() {
    wait_products<0>();
    fence_registers(scores_.x[0]);
    release(k_);
  }

  // The place of the next tile's Q.
  __device__ __forceinline__ typename Memory::RingQ next_q() const {
    typename Memory::RingQ next = q_;
    next.advance();
    return next;
  }
  // Whether the next tile begins with a block that this warpgroup's rows see.
  __device__ __forceinline__ bool next_tile_begins() const {
    next_q().wait_full();  // there is one more where there are no more tiles
    const KeyBlocks<int> mine = memory_.read_blocks(tile_ + 1, warpgroup_);
    return !mine.empty() && mine.end == memory_.read_blocks(tile_ + 1, Config::kWarpgroups).end;
  }
  // Whether it is one of the tile's blocks, and follows its maximum: where not every row sees all of it, and up to 128
  // keys from the end. Of up to 512 keys, where a largest P that is not 1 makes the error 5 % larger, two blocks.
  __device__ __forceinline__ bool follows_maximum(int block) const {
    const KeyBlocks<int> mine = my_blocks();
    if (block < mine.begin) return false;
    const int at_end = mine.end - mine.begin <= 512 / Config::kKeys ? 2 : 128 / Config::kKeys;
    if (!kKeeps || !mine.is_full(block) || mine.end - block <= at_end) return true;
    if constexpr (kTerms == Terms::alibi) {  // on the way to the diagonal, scores grow: their maximum does not last
      const Work tile = work();
      return (block + 1) * Config::kKeys > row_begin(tile) + tile.band.seqlen_k - tile.band.seqlen_q;
    }
    return false;
  }
  __device__ __forceinline__ void finish_blocks() {
    release_q();
    last_step();
    skip(my_blocks().begin - blocks_of_all().begin);
  }

  // All scores of the tile are there.
  __device__ __forceinline__ void release_q() {
    if constexpr (!Config::kStoresByCopy) release(q_);
  }

  // Blocks that only other warpgroups' rows see.
  __device__ __forceinline__ void skip(int blocks) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      take_turn();
      pass_turn();
      k_.wait_full();
      release(k_);
      v_.wait_full();
      release(v_);
    }
  }

  // P = exp(S - m) of the first block.
  __device__ __forceinline__ void first_step(int block) {
    finish_scores<false>(block);
    follow();
    release_overlay();
    if constexpr (kTerms == Terms::any) drop(block);
    pack_p(block);
  }

  // S = Q K^T and P = exp(S - m) of a block, and with the P before it O += P V. kKeep: m stays, if it can; every row
  // sees all keys.
  template <bool kKeep>
  __device__ __forceinline__ void step(int block) {
    const Descriptor k = next_keys();
    k_.wait_full();
    take_turn();
    start_scores(q(), k);
    v_.wait_full();
    start_pv();
    pass_turn();
    wait_products<1>();
    fence_registers(scores_.x[0]);

    cuda::RowFactors<1> factors;
    bool moved = true;
    if constexpr (kKeep) {
      moved = keep(block, factors);
      release(k_);
    } else {
      release(k_);
      finish_scores<false>(block);
      factors = follow();
    }
    release_overlay();
    if constexpr (kTerms == Terms::any) drop(block);

    wait_products<0>();
    fence_registers(scores_.x[0]);
    fence_registers(output_.x[0]);
    release(v_);
    pack_p(block);
    if (kKeep ? moved : factors.any_moved()) cuda::rescale(output_, factors);
  }

  // P with the m that is there, or, where it is too low, with one that has moved: by `factors`. Whether it has.
  __device__ __forceinline__ bool keep(int block, cuda::RowFactors<1>& factors) {
    const auto redo = [&](const auto& rows) {
      multiply_warp(scores_, q(), warp_row_, memory_.k(k_.stage()));
      finish_scores<true>(block);
      factors = follow(rows);
    };
    const auto keep_with = [&](auto&& difference, auto&& where_too_low) {
      return cuda::keep_maximum(states_, scores_, difference, where_too_low);
    };
    if constexpr (kTerms == Terms::softcap) {
      // The series goes beside the exponentials, which wait for another unit. Both ways have one copy of what redoes.
      cuda::RowFlags<1> rows;
      const auto remember = [&](const auto& these) { rows = these; };
      const cuda::SoftcapSeries& series = call_.constants.softcap_series;
      bool moved;
      if (cuda::series_suffices(scores_, series)) {
        moved = keep_with([&](float x, float m, auto...) { return cuda::sum_series(series, x) - m; }, remember);
      } else {
        cuda::cap_mixed_scores<T>(scores_, call_.constants);
        moved = keep_with([](float x, float m, auto...) { return x - m; }, remember);
      }
      if (moved) redo(rows);
      return moved;
    } else if constexpr (kTerms == Terms::alibi) {
      // What is added takes m along. Such blocks are below the diagonal.
      const auto term = alibi(work(), block);
      return keep_with(
          [&](float x, float m, auto... at) { return fmaf(x, scale_log2(), term.below(scores_, -m, at...)); }, redo);
    } else {
      return keep_with([&](float x, float m, auto...) { return fmaf(x, scale_log2(), -m); }, redo);
    }
  }

  // O += P V of the last block.
  __device__ __forceinline__ void last_step() {
    v_.wait_full();
    start_pv();
    wait_products<0>();
    fence_registers(output_.x[0]);
    release(v_);
  }

  // K as operand: known before its turn, in which the tensor cores would wait for what leads there.
  __device__ __forceinline__ Descriptor next_keys() const { return Descriptor(memory_.k(k_.stage()).base).now(); }
  __device__ __forceinline__ void start_scores(const typename Memory::Q& q, const Descriptor& k) {
    begin_products();
    start_straight<typename Memory::Q, typename Memory::K>(scores_, q, k);
  }
  __device__ __forceinline__ void start_pv() {
    fence_registers(output_.x[0]);
    fence_registers(p_fragments_);
    begin_products();
    start_transposed(output_, p_fragments_, memory_.v(v_.stage()));
  }

  __device__ __forceinline__ cuda::ScoreTerms<T> terms(const Work& tile) const {
    return {p_, call_.constants, tile.batch, tile.head, tile.band};
  }

  __device__ __forceinline__ void apply_overlay() {
    if constexpr (Memory::kHasOverlay) {
      overlay_.wait_full();
      const bool one_row = overlay_of<kTerms>(p_).size_row == 1;
      const auto tile = memory_.overlay(overlay_.stage(), warpgroup_);
      for_each_element(tile, one_row ? 0 : warp_row_, one_row, [&](int m, int half, int n, int e, auto element) {
        float& x = scores_.at(m, half, n, e);
        if constexpr (kTerms == Terms::bias)
          x = fmaf(x, call_.constants.scale, cuda::as_float(element));
        else if (element == 0)
          x = minus_infinity<float>();
      });
    }
  }
  __device__ __forceinline__ void release_overlay() {
    if constexpr (Memory::kHasOverlay) release(overlay_);
  }
  // Products become scores, but for a scale that the exponential brings. kWhole: every row sees all keys.
  template <bool kWhole>
  __device__ __forceinline__ void finish_scores(int block) {
    if (kTerms == Terms::softcap) cuda::cap_scores<T>(scores_, call_.constants);
    apply_overlay();
    const bool edge = !kWhole && !my_blocks().is_full(block);
    if (kTerms != Terms::any && kTerms != Terms::alibi && !edge) return;
    const Work tile = work();
    const int row = row_begin(tile) + warp_row_, key = key_begin(tile, block);
    if (kTerms == Terms::any) terms(tile).apply(scores_, row, key, [](int, int, int, int, float) {});
    if (kTerms == Terms::alibi) alibi(tile, block).add(scores_, scale_log2());
    if (edge) cuda::mask_sides(scores_, tile.band, row, key);
  }
  __device__ __forceinline__ auto alibi(const Work& tile, int block) const {
    const int row = row_begin(tile) + warp_row_, key = block * Config::kKeys;
    return cuda::Alibi(scores_, slope_log2_, row + tile.band.seqlen_k - tile.band.seqlen_q - key);
  }
  // Where instructions find it: a third register that they read would be paid by the products.
  __device__ __forceinline__ float scale_log2() const { return call_.constants.scale_log2; }
  __device__ __forceinline__ float exponent_scale() const {
    return kTerms == Terms::none || kTerms == Terms::dropout || kTerms == Terms::mask ? scale_log2() : 1.0f;
  }
  __device__ __forceinline__ cuda::RowFactors<1> follow(const cuda::RowFlags<1>& keep = {}) {
    return cuda::follow_maximum<kNatural>(states_, scores_, exponent_scale(), keep);
  }

  // P as left operand of O. What dropout takes from it counts in l.
  __device__ __forceinline__ void pack_p(int block) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const sm80::FragmentA<T> fragment = sm80::as_left_operand<T>(scores_, 0, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) p_fragments_[k][i] = fragment.x[i];
    }
    if constexpr (kTerms == Terms::dropout) {
      const Work tile = work();
      terms(tile).for_each_dropout_call(
          scores_, row_begin(tile) + warp_row_, block * Config::kKeys, [&](int, int k, const uint32_t (&words)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) p_fragments_[k][i] &= cuda::kept_halves(words[i], call_.constants.threshold);
          });
    }
  }
  __device__ __forceinline__ void drop(int block) {
    if (!call_.constants.drops()) return;
    const Work tile = work();
    terms(tile).dropout(scores_, row_begin(tile) + warp_row_, block * Config::kKeys,
                        [&](int m, int half, int n, int e, bool kept) {
                          if (!kept) scores_.at(m, half, n, e) = 0;
                        });
  }

  // O / l and lse = m + log l, the sink counted in.
  __device__ __forceinline__ void finish() {
    const Work tile = work();
    const int row = row_begin(tile) + warp_row_;
    output_.for_each_row([&](int m, int half) {
      states_.x[m][half].l = cuda::quad_sum(states_.x[m][half].l);
      RowState<float> state = states_.x[m][half].total();
      const float factor = p_.sinks ? state.add_sink(static_cast<const float*>(p_.sinks)[head(tile)]) : 1.0f;
      float weight = factor * state.inverse_sum();
      if constexpr (kGeneral || kTerms == Terms::dropout) weight *= call_.constants.kept_weight;
#pragma unroll
      for (int n = 0; n < ND; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) output_.at(m, half, n, e) *= weight;
      const int i = row + output_.row(m, half);
      if (lane_index() % 4 == 0 && i < tile.band.seqlen_q)
        *stats_ptr<float>(p_.lse, tile.batch, tile.q_start + i, head(tile)) = state.lse();
    });
    if constexpr (!Config::kStoresByCopy)
      sm80::write_rows<T>(output_, p_.out, tile.batch, tile.q_start + row, tile.head, tile.band.seqlen_q - row, 0,
                          static_cast<int>(p_.head_dim_v), 1.0f);
    else
      store_by_copy(tile, row);
  }

  __device__ __forceinline__ void store_by_copy(const Work& tile, int row) const {
    const typename Memory::O o = memory_.o(q_.stage(), warpgroup_);
    const int lane = opaque(lane_index());
#pragma unroll
    for (int pair = 0; pair < ND / 2; ++pair)
      store_matrices(o.address(warp_row_ + lane % 16, 16 * pair + lane / 16 * 8),
                     sm80::as_left_operand<T>(output_, 0, pair).x);
    if (!stored_whole<Config>(tile, warpgroup_)) store_rows(tile, o, row);
    fence_async_proxy();  // O is copied from there, or a Q to there
    __syncwarp();
    arrive_if(memory_.out_full(q_.stage()), lane_index() == 0);
  }

  // The warp's rows of O that belong to the sequence.
  __device__ __forceinline__ void store_rows(const Work& work, const typename Memory::O& o, int row) const {
    constexpr int kChunk = 8, kLanes = Memory::O::kBlocks * 8;
    __syncwarp();
    const int rows = min(work.band.seqlen_q - row, 16), cols = static_cast<int>(p_.head_dim_v);
#pragma unroll 1
    for (int i = lane_index(); i < rows * kLanes; i += cuda::kWarpThreads) {
      const int col = i % kLanes * kChunk;
      if (col < cols)
        *reinterpret_cast<uint4*>(row_ptr<T>(p_.out, work.batch, work.q_start + row + i / kLanes, head(work)) + col) =
            sm80::load_shared_16_bytes(o.address(warp_row_ + i / kLanes, col));
    }
  }

  __device__ __forceinline__ void take_turn() {
    if constexpr (Config::kTakesTurns) wait(memory_.turn(warpgroup_), turn_);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (!Config::kTakesTurns) return;
    arrive_if(memory_.turn((warpgroup_ + 1) % Config::kWarpgroups), lane_index() == 0);
    turn_ ^= 1;
  }

  template <class Ring>
  __device__ __forceinline__ static void release(Ring& ring) {
    arrive_if(ring.empty(), lane_index() == 0);
    ring.advance();
  }
  __device__ __forceinline__ typename Memory::Q q() const { return memory_.q(q_.stage(), warpgroup_); }

  const ForwardCall& call_;
  const Problem& p_;
  const Memory memory_;
  typename Memory::RingQ q_;
  typename Memory::RingK k_;
  typename Memory::RingV v_;
  typename Memory::RingOverlay overlay_;
  const int warpgroup_, warp_row_;  // the warp's rows begin at warp_row_ of the warpgroup's
  float slope_log2_ = 0;            // of ALiBi, for the tile's head
  unsigned tile_ = 0;
  uint32_t turn_;  // parity of this warpgroup's turns: the first one has the first at once
  cuda::RowStates<1, kNatural> states_;
  Accumulator<1, N> scores_;
  Accumulator<1, ND> output_;
  uint32_t p_fragments_[kSteps][4];
};

template <class T, class Config, Terms kTerms>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_kernel(const __grid_constant__ ForwardCall call) {
  using Memory = ForwardMemory<T, Config>;
  const Memory memory{sm80::shared_offset(sm80::dynamic_shared_memory())};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&call.q, &call.k, &call.v, &call.out}) prefetch(*map);
    if (Memory::kHasOverlay) prefetch(call.overlay);
    memory.init_barriers();
  }
  __syncthreads();
  wait_for_previous();
  const int warp = uniform(warp_index());
  if (warp < 4) {
    give_registers_back<Config::kMoverRegisters>();
    if (warp == 0) Loader<T, Config>(call, memory).run();
    if (Config::kStoresByCopy && warp == 1) store_tiles<T, Config>(call, memory);
    if constexpr (Memory::kHasOverlay)
      if (warp == 2) load_overlay<T, Config>(call, memory);
  } else {
    take_registers<Config::kComputeRegisters>();
    Computer<T, Config, kTerms>(call, memory, warp - 4).run();
  }
}

template <class T, class Config, Terms kTerms>
void run_kernel(const Problem& p, const Execution& execution) {
  const bool heads_first = Config::kOverlay != Terms::none && heads_go_first(p, overlay_of<Config::kOverlay>(p));
  const int64_t heads = p.heads / Config::kHeads;
  GridSchedule schedule(heads_first ? heads : p.batch, heads_first ? p.batch : heads, p.max_seqlen_q, Config::kRows,
                        p.cu_seqlens_q, p.total_q);
  const int64_t rows_q = p.cu_seqlens_q ? p.total_q : p.max_seqlen_q;
  const int64_t rows_k = p.cu_seqlens_k ? p.total_k : p.max_seqlen_k;
  schedule.group_pairs(heads_first ? std::max(p.batch, concurrent_heads(p)) : concurrent_heads(p));
  schedule.last_first = true;

  const int64_t blocks = std::min<int64_t>(schedule.size(), cuda::multiprocessors());
  // Tiles that differ in length are taken by whoever is free.
  int* counter = nullptr;
  if (p.uneven() && schedule.size() > blocks) {
    counter = static_cast<int*>(execution.workspace);
    cuda::clear(counter, sizeof(int), execution.stream);
  }

  using Memory = ForwardMemory<T, Config>;
  const int64_t batch_q = p.cu_seqlens_q ? 1 : p.batch, batch_k = p.cu_seqlens_k ? 1 : p.batch;
  ForwardCall call{p,
                   schedule,
                   heads_first,
                   counter,
                   cuda::ScoreConstants(p),
                   make_tensor_map(p.dtype, p.q, {p.head_dim, rows_q, p.heads, batch_q}, kWarpgroupRows),
                   make_tensor_map(p.dtype, p.k, {p.head_dim, rows_k, p.heads_kv, batch_k}, Config::kKeys),
                   make_tensor_map(p.dtype, p.v, {p.head_dim_v, rows_k, p.heads_kv, batch_k}, Config::kKeys),
                   make_tensor_map(p.dtype, p.out, {p.head_dim_v, rows_q, p.heads, batch_q}, kWarpgroupRows),
                   {}};
  if constexpr (Memory::kHasOverlay)
    call.overlay = make_tensor_map<typename Memory::Overlay>(p.dtype, overlay_of<Config::kOverlay>(p));
  const cuda::Grid grid{
      .blocks = blocks, .threads = Config::kThreads, .shared_bytes = Memory::kBytes, .overlaps = true};
  cuda::launch("sm90 forward", forward_kernel<T, Config, kTerms>, grid, execution.stream, call);
}

template <class T, Terms kTerms>
void run_forward(const Problem& p, const Execution& execution) {
  if constexpr (FAE_HEAD_DIM == 64 && kTerms == Terms::none) {
    if (p.max_seqlen_q <= TwoHeadsTile::kRows && p.heads % 2 == 0)
      return run_kernel<T, TwoHeadsTile, kTerms>(p, execution);
  }
  run_kernel<T, ForwardConfig<FAE_HEAD_DIM, kTerms>, kTerms>(p, execution);
}

}  // namespace

template <>
void forward<DType::FAE_DTYPE, FAE_HEAD_DIM>(const Problem& p, const Execution& execution) {
  cuda::with_terms(p, [&](auto terms) {
    // Compilers take a minute for each kernel of a large head dim, with which a bias or a mask is rare.
    constexpr bool kRare = FAE_HEAD_DIM > 128 && (terms() == Terms::bias || terms() == Terms::mask);
    constexpr Terms kTerms = kRare ? Terms::any : terms();
    if constexpr (kTerms == Terms::bias || kTerms == Terms::mask)
      if (!readable(overlay_of<kTerms>(p), kOverlayElementSize<kTerms>))
        return run_forward<ElementOf<DType::FAE_DTYPE>, Terms::any>(p, execution);
    run_forward<ElementOf<DType::FAE_DTYPE>, kTerms>(p, execution);
  });
}

}  // namespace fae::sm90
