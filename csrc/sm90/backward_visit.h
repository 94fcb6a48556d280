#pragma once

#include "backward_memory.h"

// What warpgroups that compute do alike, however they share the work of a step.

namespace fae::sm90 {

// f(keys) for every key block that the loading warp takes.
template <class Memory, class F>
__device__ __forceinline__ void for_each_key_block(const Memory& memory, F&& f) {
#pragma unroll 1
  for (unsigned number = 0;; ++number) {
    wait(memory.k_full(), number % 2);
    const KeyBlock keys = read_struct<KeyBlock>(memory.key_block());
    if (keys.batch < 0) return;
    f(keys);
  }
}

// P = exp(scale S), of S less lse.
template <class Scores>
__device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2) {
  // No probability exceeds 1; beside huge scores, whose rounding is larger than that of lse, the limit is needed.
  scores.for_each([&](int m, int half, int n, int e) {
    float& x = scores.at(m, half, n, e);
    x = cuda::exp2_approx(fminf(x * scale_log2, 0.0f));
  });
}

// -lse / scale (number 0) or -delta (1) of a row, from what products take (cuda/delta.h).
__device__ __forceinline__ float folded_statistic(uint32_t statistics, int row, int number) {
  const uint32_t address = statistics + 16 * row, middle = sm80::load_shared(address + 4);
  const uint32_t side = sm80::load_shared(address + 8 * number);
  const float first = __uint_as_float(side << 16), second = __uint_as_float(side & 0xffff0000u);
  const float third = __uint_as_float(number == 0 ? middle << 16 : middle & 0xffff0000u);
  return 2 * (first + second + third);
}

template <class T, class Config>
__device__ __forceinline__ void wait_for_turn(const BackwardMemory<T, Config>& memory, unsigned number) {
  wait(memory.turn(number), BackwardMemory<T, Config>::StepBuffers::parity(number));
}

// A warpgroup's part of a sum in global memory, which begins at `partial`: where this thread has its elements. `piece`
// numbers the pieces of 64 rows by 8 columns (or the other way round) of all parts, from this part's first one on.
__device__ __forceinline__ float4* my_elements(float* partial, int piece) {
  return reinterpret_cast<float4*>(partial) + piece * kWarpgroupThreads +
         opaque(static_cast<int>(threadIdx.x)) % kWarpgroupThreads;
}

// In its turn, adds x to what `rank` earlier visitors have left. x has every kStep-th piece, from the pair number
// `begin` on: to ask for each single one takes 5 % of the time.
template <int kStep = 1, int N>
__device__ __forceinline__ void leave(float* partial, int piece, const Accumulator<1, N>& x, int rank, int begin = 0) {
  static_assert(N % 2 == 0);
  float4* const mine = my_elements(partial, piece);
  constexpr int kStride = kStep * kWarpgroupThreads;
  if (rank > 0) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (n / 2 < begin) continue;
      sm80::add_to_global(reinterpret_cast<float*>(mine + n * kStride), x.x[0][n]);
      sm80::add_to_global(reinterpret_cast<float*>(mine + (n + 1) * kStride), x.x[0][n + 1]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n / 2 >= begin) mine[n * kStride] = {x.x[0][n][0], x.x[0][n][1], x.x[0][n][2], x.x[0][n][3]};
  }
}

// The last visitor takes what the others have left.
template <int kStep = 1, int N>
__device__ __forceinline__ void collect(float* partial, int piece, Accumulator<1, N>& x, int rank, int begin = 0) {
  if (rank == 0) return;
  const float4* const mine = my_elements(partial, piece);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (n / 2 < begin) continue;
    const float4 others = __ldcg(mine + n * kStep * kWarpgroupThreads);
    x.x[0][n][0] += others.x, x.x[0][n][1] += others.y, x.x[0][n][2] += others.z, x.x[0][n][3] += others.w;
  }
}

// A part of a step's dQ; write(x) has the sum.
template <class Config, int kStep = 1, int N, class Write>
__device__ __forceinline__ void visit_dq(const BackwardCall& call, Accumulator<1, N>& dq, const Step& step, int piece,
                                         Write&& write) {
  // Of a block that begins before its sequence, places without a row of that do not exist: `first` may be in the memory
  // of others, which is left alone.
  if constexpr (Config::kPlaceRows < Config::kRows)
    static_assert(Config::kPlaceRows == 16 && Config::kSharesDim, "a place is a pair of every warpgroup's pieces");
  const int first = step.last_place + 1 - Config::kRows / Config::kPlaceRows;
  float* const partial = call.dq_partial + int64_t{first} * Config::kPlaceRows * Config::kDim;
  const int begin = Config::kPlaceRows < Config::kRows ? max(-step.row_begin, 0) / Config::kPlaceRows : 0;
  if (step.no_visit()) return;
  if (!step.last_visit()) return leave<kStep>(partial, piece, dq, step.rank(), begin);
  collect<kStep>(partial, piece, dq, step.rank(), begin);
  write(dq);
}

// A gradient that several tasks add to, in turn: leave() or, for the last of them, collect(). Warps need not wait for
// each other: each has turns of its own, for what its own lanes add. done: tasks whose warp is done.
template <class Leave, class Collect>
__device__ __forceinline__ void take_turn(int* done, int rank, bool last, Leave&& leave, Collect&& collect) {
  if (rank > 0) {
    while (sm80::load_acquire(done) < rank) {
    }
  }
  if (last) return collect();
  leave();
  __syncwarp();
  if (lane_index() == 0) sm80::store_release(done, rank + 1);
}

// dK and dV of keys that several query heads share: leave(partial) or collect(partial), where those of the block lie.
template <class Config, class Leave, class Collect>
__device__ __forceinline__ void visit_keys(const BackwardCall& call, const KeyBlock& keys, int warp, Leave&& leave,
                                           Collect&& collect) {
  if (keys.again()) return;
  float* const partial = call.dkv_partial + int64_t{keys.slot} * 2 * Config::kKeys * Config::kDim;
  take_turn(
      call.key_turns + keys.slot * 4 * Config::kWarpgroups + warp, keys.rank(), keys.last_head(),
      [&] { leave(partial); }, [&] { collect(partial); });
}

}  // namespace fae::sm90
