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
    x = sm80::exp2_approx(fminf(x * scale_log2, 0.0f));
  });
}

template <class T, class Config>
__device__ __forceinline__ void wait_for_turn(const BackwardMemory<T, Config>& memory, unsigned number) {
  wait(memory.turn(number), BackwardMemory<T, Config>::StepBuffers::parity(number));
}

// In the step's turn, adds a warpgroup's part of dQ to what earlier visitors have left; the last visitor takes what
// they have left, and then write(dq) has the sum. `piece` numbers the pieces of 64 rows by 8 columns (or the other way
// round) of the query block, from this part's first one on.
template <class Config, int N, class Write>
__device__ __forceinline__ void visit_dq(const BackwardCall& call, Accumulator<1, N>& dq, const Step& step, int piece,
                                         Write&& write) {
  float4* const partial =
      reinterpret_cast<float4*>(call.dq_partial + int64_t{step.slot} * Config::kRows * Config::kDim) +
      piece * kWarpgroupThreads + static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  if (!step.last_visit()) {
    if (step.rank() > 0) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        sm80::add_to_global(reinterpret_cast<float*>(partial + n * kWarpgroupThreads), dq.x[0][n]);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n)
        partial[n * kWarpgroupThreads] = {dq.x[0][n][0], dq.x[0][n][1], dq.x[0][n][2], dq.x[0][n][3]};
    }
  } else {
    if (step.rank() > 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float4 others = __ldcg(partial + n * kWarpgroupThreads);
        dq.x[0][n][0] += others.x, dq.x[0][n][1] += others.y, dq.x[0][n][2] += others.z, dq.x[0][n][3] += others.w;
      }
    }
    write(dq);
  }
}

}  // namespace fae::sm90
