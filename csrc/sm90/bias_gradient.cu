#include "../core/schedule.h"
#include "../cuda/launch.h"
#include "../cuda/terms.h"
#include "../sm80/kernels.h"
#include "config.h"
#include "kernels.h"
#include "overlay.h"
#include "pipeline.h"
#include "tensor_map.h"
#include "tile.h"

// dbias of a bias that several batches or heads share, in a pass of its own before the backward:
//   P = exp(S - lse),  dP = dO V^T,  dbias = sum over what shares it of P (dP - delta).
// Thread blocks stay and take one tile of dbias after the other. Two warpgroups have 64 rows of it each, in registers,
// and visit the blocks of scores that fall into it one by one, in a fixed order: no atomics, and the same bits however
// tiles are dealt out. Rows (Q, then dO) and keys (K, then V) come through a ring each; the bias of the tile is there
// for all visits. No sum goes over scores of different rows or keys: what lies beyond the tensors' ends goes no further
// than into elements that nobody writes.

namespace fae::sm90 {
namespace {

// A tile of dbias, and a share of the visits to it, on its way from the loading thread to those that compute.
struct alignas(16) BiasTask {
  int batch = 0, head = 0, row = 0, key = 0;  // the first that share it; batch -1: there are no more
  int begin = 0, end = 0;                     // of the visits
  uint32_t number = 0;
};

// A block of scores that falls into a tile. Heads that share keys follow each other: whether the visit is the first to
// its keys, and the last.
struct BiasVisit {
  int batch, head;
  bool brings_keys, ends_keys;
};

// How dbias is cut, and where tiles are few, the visits to each of them. By shapes only: the order of a sum follows.
// Numbers in 32 bits, as GPUs divide them.
template <class Config>
struct BiasTasks {
  static constexpr int64_t kEnough = 256;     // to occupy a GPU
  static constexpr int64_t kLeastVisits = 4;  // worth writing, and reading, what they add up to
  int heads, group, visits;                   // query heads that share a tile, that share keys
  uint32_t size_head, row_tiles, col_tiles, tiles, splits;

  explicit BiasTasks(const BackwardProblem& p)
      : heads(static_cast<int>(p.heads / p.dbias.size_head)),
        group(static_cast<int>(p.heads / p.heads_kv)),
        visits(static_cast<int>(p.batch / p.dbias.size_batch) * heads),
        size_head(static_cast<uint32_t>(p.dbias.size_head)),
        row_tiles(static_cast<uint32_t>(ceil_div(p.max_seqlen_q, int64_t{Config::kRows}))),
        col_tiles(static_cast<uint32_t>(ceil_div(p.max_seqlen_k, int64_t{Config::kKeys}))),
        tiles(static_cast<uint32_t>(p.dbias.size_batch) * size_head * row_tiles * col_tiles),
        splits(
            static_cast<uint32_t>(std::clamp<int64_t>(visits / kLeastVisits, 1, ceil_div(kEnough, int64_t{tiles})))) {}

  FAE_INLINE uint32_t size() const { return tiles * splits; }
  FAE_INLINE BiasTask operator[](uint32_t number) const {
    const uint32_t split = number / tiles, tile = number - split * tiles;
    const uint32_t line = tile / col_tiles, rest = line / row_tiles, batch = rest / size_head;
    const auto first_of = [&](uint32_t share) { return static_cast<int>(uint64_t{share} * visits / splits); };
    return {static_cast<int>(batch),
            static_cast<int>(rest - batch * size_head),
            static_cast<int>(line - rest * row_tiles) * Config::kRows,
            static_cast<int>(tile - line * col_tiles) * Config::kKeys,
            first_of(split),
            first_of(split + 1),
            number};
  }
  // Floats of the shares of dbias that are to be added up.
  FAE_INLINE int64_t shares() const { return splits > 1 ? int64_t{size()} * Config::kRows * Config::kKeys : 0; }

  // f(visit) for the visits of a task.
  template <class F>
  __device__ __forceinline__ void for_each_visit(const BiasTask& task, F&& f) const {
    int batch = task.batch + task.begin / heads, head = task.head + task.begin % heads;
    bool brings_keys = true;
#pragma unroll 1
    for (int left = task.end - task.begin; left > 0; --left) {
      const int next = head + 1;
      const bool ends_batch = next == task.head + heads;
      const bool ends_keys = left == 1 || ends_batch || next % group == 0;
      f(BiasVisit{batch, head, brings_keys, ends_keys});
      brings_keys = ends_keys;
      head = ends_batch ? task.head : next;
      batch += ends_batch;
    }
  }
};

template <class Config>
struct BiasCall {
  BackwardProblem p;
  BiasTasks<Config> tasks;
  uint32_t* counter;      // of tasks taken, beyond each thread block's first; null: they are dealt out in turn
  float* shares;          // [task][what a lane holds, 16 bytes at a time][thread]; null: dbias is written at once
  cuda::DeviceBand band;  // of all sequences: their lengths are the tensors'
  TensorMap q, k, v, dout, bias;

  // Whether some row of a tile sees something; otherwise dbias has zeros there.
  __device__ __forceinline__ bool is_seen(const BiasTask& tile) const {
    const auto seen = band.any(tile.row, min(tile.row + Config::kRows, band.seqlen_q));
    return !seen.empty() && seen.begin < tile.key + Config::kKeys && seen.end > tile.key;
  }
};

template <class T, class Config>
struct BiasMemory {
  using Rows = SharedTile<T, kWarpgroupRows, Config::kDim>;  // of one warpgroup
  using Keys = SharedTile<T, Config::kKeys, Config::kDim>;
  using Bias = SharedTile<T, Config::kRows, Config::kKeys>;
  using RingOperands = Ring<Config::kStages>;
  using RingBias = Ring<1>;
  using Tasks = NumberedBuffers<2>;  // one is computed, the next one's operands may be there
  static constexpr int kRowsBytes = Config::kWarpgroups * Rows::kBytes;
  static constexpr int kKeys = Config::kStages * kRowsBytes, kBias = kKeys + Config::kStages * Keys::kBytes;
  static constexpr int kTasks = kBias + Bias::kBytes;
  static constexpr int kRingRows = kTasks + Tasks::kCount * static_cast<int>(sizeof(BiasTask));
  static constexpr int kRingKeys = kRingRows + RingOperands::kBytes, kRingBias = kRingKeys + RingOperands::kBytes;
  static constexpr int kBytes = kRingBias + RingBias::kBytes;
  static_assert(kBytes <= 227 * 1024);

  uint32_t base;

  __device__ Rows rows(int stage, int warpgroup) const {
    return {base + stage * kRowsBytes + warpgroup * Rows::kBytes};
  }
  __device__ Keys keys(int stage) const { return {base + kKeys + stage * Keys::kBytes}; }
  __device__ Bias bias() const { return {base + kBias}; }
  __device__ uint32_t task(unsigned number) const {
    return base + kTasks + Tasks::stage(number) * static_cast<int>(sizeof(BiasTask));
  }
  __device__ RingOperands ring_rows() const { return RingOperands(base + kRingRows); }
  __device__ RingOperands ring_keys() const { return RingOperands(base + kRingKeys); }
  __device__ RingBias ring_bias() const { return RingBias(base + kRingBias); }

  __device__ void init_barriers() const {
    ring_rows().init(1, 4 * Config::kWarpgroups);
    ring_keys().init(1, 4 * Config::kWarpgroups);
    ring_bias().init(1, 4 * Config::kWarpgroups);
    fence_barrier_init();
  }
};

// The thread that takes tasks and loads what they need, in the order of its use.
template <class T, class Config>
class BiasLoader {
  using Memory = BiasMemory<T, Config>;

 public:
  __device__ BiasLoader(const BiasCall<Config>& call, const Memory& memory)
      : call_(call), memory_(memory), rows_(memory.ring_rows()), keys_(memory.ring_keys()), bias_(memory.ring_bias()) {}

  __device__ void run() {
    uint32_t index = blockIdx.x;
    unsigned number = 0;
#pragma unroll 1
    while (index < call_.tasks.size()) {
      const BiasTask task = call_.tasks[index];
      index = gridDim.x + (call_.counter ? atomicAdd(call_.counter, 1u) : index);
      if (call_.is_seen(task)) load(number++, task);
    }
    rows_.wait_empty();
    write_struct(memory_.task(number), BiasTask{.batch = -1});
    arrive(rows_.full());
  }

 private:
  // The task is there when its first rows are. Its place is free: the task that had it had to end before the bias of
  // the one after it could be loaded.
  __device__ void load(unsigned number, const BiasTask& task) {
    write_struct(memory_.task(number), task);
    bool first = true;
    call_.tasks.for_each_visit(task, [&](const BiasVisit& visit) {
      load_rows(call_.q, task, visit);
      if (visit.brings_keys) load_keys(call_.k, task, visit);
      load_rows(call_.dout, task, visit);
      if (visit.brings_keys) load_keys(call_.v, task, visit);
      // Needed later than the operands, and its place becomes free later.
      if (first) load_bias(task);
      first = false;
    });
  }

  __device__ void load_rows(const TensorMap& map, const BiasTask& task, const BiasVisit& visit) {
    rows_.wait_empty();
    arrive_expecting(rows_.full(), Memory::kRowsBytes);
    for (int w = 0; w < Config::kWarpgroups; ++w)
      load_tile(memory_.rows(rows_.stage(), w), map, task.row + w * kWarpgroupRows, visit.head, visit.batch,
                rows_.full());
    rows_.advance();
  }
  __device__ void load_keys(const TensorMap& map, const BiasTask& task, const BiasVisit& visit) {
    keys_.wait_empty();
    arrive_expecting(keys_.full(), Memory::Keys::kBytes);
    load_tile(memory_.keys(keys_.stage()), map, task.key, visit.head / call_.tasks.group, visit.batch, keys_.full());
    keys_.advance();
  }
  __device__ void load_bias(const BiasTask& task) {
    bias_.wait_empty();
    arrive_expecting(bias_.full(), Memory::Bias::kBytes);
    load_overlay_tile(memory_.bias(), call_.bias, call_.p.bias, task.row, task.key, task.head, task.batch,
                      bias_.full());
    bias_.advance();
  }

  const BiasCall<Config>& call_;
  const Memory memory_;
  typename Memory::RingOperands rows_, keys_;
  typename Memory::RingBias bias_;
};

// A warp's 16 rows of a tile's sums: to dbias.
template <class T, class Config, class Scores>
__device__ __forceinline__ void write_tile(const BiasCall<Config>& call, const BiasTask& tile, int row,
                                           const Scores& sum) {
  const ScoreView& to = call.p.dbias;
  sm80::write_rows<T>(sum, {to.data, to.stride_batch, to.stride_row, to.stride_head}, tile.batch, tile.row + row,
                      tile.head, call.band.seqlen_q - tile.row - row, tile.key, call.band.seqlen_k, 1.0f);
}
// And as a task's share of them, f(n, 16 bytes) for what a lane holds.
template <class Config, class F>
__device__ __forceinline__ void for_each_word(const BiasCall<Config>& call, uint32_t task, int warp, F&& f) {
  constexpr int kWords = Config::kKeys / 8, kThreads = Config::kWarpgroups * kWarpgroupThreads;
  float4* const first = reinterpret_cast<float4*>(call.shares) + int64_t{task} * kWords * kThreads +
                        warp * cuda::kWarpThreads + lane_index();
#pragma unroll
  for (int n = 0; n < kWords; ++n) f(n, first[n * kThreads]);
}

// A warpgroup that computes.
template <class T, class Config>
class BiasComputer {
  using Memory = BiasMemory<T, Config>;
  static constexpr int N = Config::kKeys / 8;
  using Scores = Accumulator<1, N>;

 public:
  __device__ BiasComputer(const BiasCall<Config>& call, const Memory& memory, int warp)
      : call_(call),
        memory_(memory),
        warpgroup_(warp / 4),
        warp_row_(warp * 16),
        scale_log2_(static_cast<float>(call.p.softmax_scale) * cuda::kLog2e),
        rows_(memory.ring_rows()),
        keys_(memory.ring_keys()),
        bias_(memory.ring_bias()) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (unsigned number = 0;; ++number) {
      rows_.wait_full();
      const auto task = read_struct<BiasTask>(memory_.task(number));
      if (task.batch < 0) return;
      sum_.fill(0);
      call_.tasks.for_each_visit(
          task, [&](const BiasVisit& visit) __attribute__((always_inline)) { add_gradient(task, visit); });
      release(bias_.empty());
      bias_.advance();
      write(task);
    }
  }

 private:
  // Adds P (dP - delta) of a block of scores. Exponentials held beside the product of dP, by a fence before its end,
  // were not faster.
  __device__ __forceinline__ void add_gradient(const BiasTask& task, const BiasVisit& visit) {
    auto dout = rows_, values = keys_;
    dout.advance(), values.advance();
    start_product(prob_, rows_, keys_);
    float lse_log2[2], delta[2];
    load_statistics(task, visit, lse_log2, delta);
    start_product(dprob_, dout, values);
    wait_products<1>();
    fence_registers(prob_.x[0]);
    release(rows_.empty());
    if (visit.ends_keys) release(keys_.empty());

    bias_.wait_full();
    add_bias(lse_log2);
    hide(task);

    wait_products<0>();
    fence_registers(dprob_.x[0]);
    release(dout.empty());
    rows_ = dout;
    rows_.advance();
    if (visit.ends_keys) {
      release(values.empty());
      keys_ = values;
      keys_.advance();
    }
    Scores::for_each([&](int m, int half, int n, int e) {
      const float prob = cuda::exp2_approx(fminf(prob_.at(m, half, n, e), 0.0f));
      sum_.at(m, half, n, e) += prob * (dprob_.at(m, half, n, e) - delta[half]);
    });
  }

  template <class Ring>
  __device__ __forceinline__ void start_product(Scores& s, const Ring& rows, const Ring& keys) const {
    rows.wait_full();
    keys.wait_full();
    begin_products();
    start_straight(s, memory_.rows(rows.stage(), warpgroup_), memory_.keys(keys.stage()));
  }

  __device__ __forceinline__ void load_statistics(const BiasTask& task, const BiasVisit& visit, float (&lse_log2)[2],
                                                  float (&delta)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(task.row + warp_row_ + Scores::row(0, half), call_.band.seqlen_q - 1);
      lse_log2[half] = finite_max(*stats_ptr<float>(call_.p.lse, visit.batch, row, visit.head)) * cuda::kLog2e;
      delta[half] = *stats_ptr<float>(call_.p.delta, visit.batch, row, visit.head);
    }
  }

  // Products become the logarithms of probabilities.
  __device__ __forceinline__ void add_bias(const float (&lse_log2)[2]) {
    for_each_element(memory_.bias(), warp_row_, false, [&](int m, int half, int n, int e, T bias) {
      float& x = prob_.at(m, half, n, e);
      x = fmaf(x, scale_log2_, fmaf(cuda::as_float(bias), cuda::kLog2e, -lse_log2[half]));
    });
  }

  // -inf where a row does not see a key.
  __device__ __forceinline__ void hide(const BiasTask& task) {
    const int row = task.row + warpgroup_ * kWarpgroupRows;
    const auto every = call_.band.every(row, min(row + kWarpgroupRows, call_.band.seqlen_q));
    if (every.begin > task.key || every.end < min(task.key + Config::kKeys, call_.band.seqlen_k))
      cuda::mask_band(prob_, call_.band, task.row + warp_row_, task.key);
  }

  __device__ __forceinline__ void write(const BiasTask& task) const {
    if (!call_.shares) return write_tile<T>(call_, task, warp_row_, sum_);
    for_each_word(call_, task.number, warp_row_ / 16, [&](int n, float4& word) {
      word = {sum_.x[0][n][0], sum_.x[0][n][1], sum_.x[0][n][2], sum_.x[0][n][3]};
    });
  }

  const BiasCall<Config>& call_;
  const Memory memory_;
  const int warpgroup_, warp_row_;  // the warp's rows begin at warp_row_ of the tile's
  const float scale_log2_;
  typename Memory::RingOperands rows_, keys_;
  typename Memory::RingBias bias_;
  Scores prob_, dprob_, sum_;
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bias_gradient_kernel(const __grid_constant__ BiasCall<Config> call) {
  const BiasMemory<T, Config> memory{sm80::shared_offset(sm80::dynamic_shared_memory())};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&call.q, &call.k, &call.v, &call.dout, &call.bias}) prefetch(*map);
    memory.init_barriers();
  }
  __syncthreads();
  const int warp = uniform(warp_index());
  if (warp < 4) {
    give_registers_back<Config::kMoverRegisters>();
    if (threadIdx.x == 0) BiasLoader<T, Config>(call, memory).run();
  } else {
    take_registers<Config::kComputeRegisters>();
    BiasComputer<T, Config>(call, memory, warp - 4).run();
  }
}

// Adds up the shares of a tile, in their order.
template <class T, class Config>
__global__ void __launch_bounds__(Config::kWarpgroups* kWarpgroupThreads)
    bias_gradient_sum_kernel(const __grid_constant__ BiasCall<Config> call) {
  const BiasTask tile = call.tasks[blockIdx.x];
  if (!call.is_seen(tile)) return;
  Accumulator<1, Config::kKeys / 8> sum;
  sum.fill(0);
#pragma unroll 1
  for (uint32_t split = 0; split < call.tasks.splits; ++split)
    for_each_word(call, tile.number + split * call.tasks.tiles, warp_index(), [&](int n, const float4& word) {
      const float x[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.x[0][n][i] += x[i];
    });
  write_tile<T>(call, tile, warp_index() * 16, sum);
}

// ---- Host -----------------------------------------------------------------------------------------------------------

using Config = BiasGradientConfig<FAE_HEAD_DIM>;

// A bias alone that batches or heads share, of tensors that fill their sequences, in rows that the tensor memory
// accelerator can read. The rest is sm80's.
bool takes(const BackwardProblem& p) {
  const bool whole = p.dbias.size_row == p.max_seqlen_q && p.dbias.size_col == p.max_seqlen_k;
  return cuda::terms_of(p) == Terms::bias && whole && !p.lengths_in_tensors() && readable(p.bias, 2) &&
         readable(p.dbias, 2);
}

// The workspace: the counter, then shares.
constexpr size_t kCounterBytes = 256;

template <class T>
void run(const BackwardProblem& p, void* workspace, void* stream) {
  const BiasTasks<Config> tasks(p);
  const int64_t blocks = std::min<int64_t>(tasks.size(), cuda::multiprocessors());
  // Where some tiles see nothing, whoever is free takes the next one. Dealt out in turn, the tiles of a thread block
  // lie along a diagonal: of 16 heads and 4096 rows, causal, 132 blocks had 64 tiles to do each, but some 104.
  uint32_t* counter = nullptr;
  if (p.uneven() && tasks.size() > blocks) {
    counter = static_cast<uint32_t*>(workspace);
    cuda::clear(counter, sizeof(*counter), stream);
  }
  const auto map = [&](const TensorView& view, int64_t cols, int64_t rows, int64_t heads, int box_rows) {
    return make_tensor_map(p.dtype, view, {cols, rows, heads, p.batch}, box_rows);
  };
  const BiasCall<Config> call{
      p,
      tasks,
      counter,
      tasks.shares() > 0 ? reinterpret_cast<float*>(static_cast<char*>(workspace) + kCounterBytes) : nullptr,
      {p.max_seqlen_q, p.max_seqlen_k, p.window_left, p.window_right},
      map(p.q, p.head_dim, p.max_seqlen_q, p.heads, kWarpgroupRows),
      map(p.k, p.head_dim, p.max_seqlen_k, p.heads_kv, Config::kKeys),
      map(p.v, p.head_dim_v, p.max_seqlen_k, p.heads_kv, Config::kKeys),
      map(p.dout, p.head_dim_v, p.max_seqlen_q, p.heads, kWarpgroupRows),
      make_tensor_map<typename BiasMemory<T, Config>::Bias>(p.dtype, p.bias)};
  cuda::launch("sm90 bias gradient", bias_gradient_kernel<T, Config>,
               cuda::Grid{blocks, Config::kThreads, BiasMemory<T, Config>::kBytes}, stream, call);
  if (!call.shares) return;
  cuda::launch("sm90 bias gradient sum", bias_gradient_sum_kernel<T, Config>,
               cuda::Grid{int64_t{tasks.tiles}, Config::kWarpgroups * kWarpgroupThreads}, stream, call);
}

}  // namespace

template <>
size_t bias_gradient_workspace<FAE_HEAD_DIM>(const BackwardProblem& p) {
  if (!takes(p)) return sm80::bias_gradient_workspace<FAE_HEAD_DIM>(p);
  return kCounterBytes + static_cast<size_t>(BiasTasks<Config>(p).shares()) * sizeof(float);
}

template <>
void bias_gradient<FAE_HEAD_DIM>(const BackwardProblem& p, void* workspace, void* stream) {
  if (!takes(p)) return sm80::bias_gradient<FAE_HEAD_DIM>(p, workspace, stream);
  p.dtype == DType::bfloat16 ? run<__nv_bfloat16>(p, workspace, stream) : run<__half>(p, workspace, stream);
}

}  // namespace fae::sm90
