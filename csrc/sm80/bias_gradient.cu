#include "../core/schedule.h"
#include "../cuda/launch.h"
#include "kernels.h"
#include "recompute.h"

// dbias, where the backward does not write it, above all of a bias that several scores share, in a pass of its own: a
// thread block owns a tile of dbias, or one of a few shares of it, and visits all blocks of scores that fall into it.
// Sums have a fixed order, and nothing of size S x S exists besides dbias. That recomputes S and dP, two products of
// seven; only calls whose bias wants a gradient pay.

namespace fae::sm80 {
namespace {

constexpr int64_t kTasks = 512;  // enough thread blocks to fill a GPU

// How dbias is cut. A dimension that broadcasts has one tile, and its blocks are visited one after the other.
template <class Config>
struct BiasTiles {
  bool every_row, every_col;
  int64_t batches, heads, row_blocks, col_blocks;  // that share a tile
  int64_t row_tiles, col_tiles, tiles, splits;
  int rows, cols;  // of a tile

  explicit BiasTiles(const BackwardProblem& p) {
    const ScoreView& view = p.dbias;
    every_row = view.size_row == 1;
    every_col = view.size_col == 1;
    batches = view.size_batch == 1 ? p.batch : 1;
    heads = view.size_head == 1 ? p.heads : 1;
    row_blocks = every_row ? ceil_div(p.max_seqlen_q, Config::kRows) : 1;
    col_blocks = every_col ? ceil_div(p.max_seqlen_k, Config::kKeys) : 1;
    rows = every_row ? 1 : Config::kRows;
    cols = every_col ? 1 : Config::kKeys;
    row_tiles = ceil_div(view.size_row, rows);
    col_tiles = ceil_div(view.size_col, cols);
    tiles = view.size_batch * view.size_head * row_tiles * col_tiles;
    splits = std::clamp<int64_t>(kTasks / tiles, 1, std::max<int64_t>(1, blocks()));
  }
  FAE_INLINE int64_t blocks() const { return batches * heads * row_blocks * col_blocks; }
  FAE_INLINE int elements() const { return rows * cols; }
  FAE_INLINE int64_t shares() const { return splits > 1 ? splits * tiles * elements() : 0; }  // of elements

  // The tile's batch, head, first row and first column in dbias.
  struct Place {
    int64_t batch, head, row, col;
  };
  FAE_INLINE Place place(int64_t tile, const ScoreView& view) const {
    const int64_t rest = tile / col_tiles / row_tiles;
    return {rest / view.size_head, rest % view.size_head, tile / col_tiles % row_tiles * rows, tile % col_tiles * cols};
  }
};

template <class Config>
struct BiasCall {
  BackwardProblem p;
  BiasTiles<Config> tiles;
  double* partial;  // [split][tile][element]; null: tiles are not shared, and dbias is written at once
  bool q_whole_vectors, k_whole_vectors, v_whole_vectors, dout_whole_vectors;
  Precision precision;
};

template <class T, class Config>
struct BiasMemory {
  using Operands = ScoreOperands<T, Config>;
  static constexpr int kKeys = Operands::Keys::kBytes, kRows = Operands::Rows::kBytes;
  static constexpr int kStatistics = 2 * kKeys + 2 * kRows;
  static constexpr int kSums = Config::kRows * Config::kKeys * static_cast<int>(sizeof(double));  // instead, at the end
  static constexpr int kBytes = std::max(kStatistics + Config::kRows * 8, kSums);

  static __device__ Operands operands(uint32_t base) {
    return {{base + 2 * kKeys}, {base + 2 * kKeys + kRows}, {base}, {base + kKeys}, base + kStatistics};
  }
};

// Starts the copies of a block of scores' operands and waits for them.
template <class T, class Config>
__device__ void load_operands(const BiasCall<Config>& call, const ScoreOperands<T, Config>& to, int batch, int head,
                              const Sequence& s, int row, int key) {
  const BackwardProblem& p = call.p;
  const int rows = static_cast<int>(s.seqlen_q) - row, keys = static_cast<int>(s.seqlen_k) - key;
  const int head_kv = head / static_cast<int>(p.heads / p.heads_kv);
  const auto copy = [&](const auto& tile, const TensorView& view, int64_t from, int h, int n, int64_t dim, bool whole) {
    copy_rows<Config::kThreads>(tile, GlobalRows<T>(view, batch, from, h, n, dim, 0, whole));
  };
  __syncthreads();  // the block before has been used
  copy(to.q, p.q, s.q_start + row, head, rows, p.head_dim, call.q_whole_vectors);
  copy(to.dout, p.dout, s.q_start + row, head, rows, p.head_dim_v, call.dout_whole_vectors);
  copy(to.k, p.k, s.k_start + key, head_kv, keys, p.head_dim, call.k_whole_vectors);
  copy(to.v, p.v, s.k_start + key, head_kv, keys, p.head_dim_v, call.v_whole_vectors);
  copy_statistics<Config>(to.statistics, p, batch, s.q_start + row, head, rows);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

// To where an element of a tile belongs, if that is in dbias.
template <class Config>
__device__ void write_element(const BiasTiles<Config>& tiles, const ScoreView& view, int64_t tile, int64_t element,
                              double x) {
  const auto place = tiles.place(tile, view);
  const int64_t row = place.row + element / tiles.cols, col = place.col + element % tiles.cols;
  if (row >= view.size_row || col >= view.size_col) return;
  const int64_t offset = score_offset(view, place.batch, place.head, row, col);
  if (view.dtype == DType::float32)
    static_cast<float*>(view.data)[offset] = static_cast<float>(x);
  else if (view.dtype == DType::bfloat16)
    static_cast<__nv_bfloat16*>(view.data)[offset] = __nv_bfloat16(static_cast<float>(x));
  else
    static_cast<__half*>(view.data)[offset] = __half(static_cast<float>(x));
}

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads)
    bias_gradient_kernel(const __grid_constant__ BiasCall<Config> call) {
  using Warps = ScoreWarps<Config>;
  using Recompute = sm80::Recompute<T, Config, true>;
  const BackwardProblem& p = call.p;
  const BiasTiles<Config>& tiles = call.tiles;
  const int64_t split = blockIdx.x / tiles.tiles, tile = blockIdx.x % tiles.tiles;
  const auto place = tiles.place(tile, p.dbias);
  const auto operands = BiasMemory<T, Config>::operands(shared_offset(dynamic_shared_memory()));

  using Scores = typename Recompute::Scores;
  double sum[Scores::kRowPieces][2][Scores::kColPieces][2] = {};
  const int64_t end = (split + 1) * tiles.blocks() / tiles.splits;
  for (int64_t i = split * tiles.blocks() / tiles.splits; i < end; ++i) {
    const int64_t rest = i / tiles.col_blocks / tiles.row_blocks;
    const int batch = static_cast<int>(place.batch + rest / tiles.heads);
    const int head = static_cast<int>(place.head + rest % tiles.heads);
    const int row = static_cast<int>(place.row + i / tiles.col_blocks % tiles.row_blocks * Config::kRows);
    const int key = static_cast<int>(place.col + i % tiles.col_blocks * Config::kKeys);
    const Sequence s = sequence_of(p, batch);
    const cuda::DeviceBand band(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
    const auto seen = band.any(row, min(row + Config::kRows, band.seqlen_q));
    if (row >= band.seqlen_q || seen.empty() || seen.begin >= key + Config::kKeys || seen.end <= key) continue;

    load_operands<T, Config>(call, operands, batch, head, s, row, key);
    if (!Warps::exists()) continue;
    Scores prob, ds;
    Recompute(p, batch, head, band, call.precision)(operands, row, key, 0, prob, ds,
                                                    [&](int m, int half, int n, int e, float x) {
                                                      if (row + Warps().col + prob.row(m, half) < band.seqlen_q)
                                                        sum[m][half][n][e] += x;
                                                    });
  }

  // The tile's sums through shared memory, where those that share an element of dbias meet.
  __syncthreads();
  auto* const sums = reinterpret_cast<double*>(dynamic_shared_memory());
  if (Warps::exists())
    Scores::for_each([&](int m, int half, int n, int e) {
      const int row = Warps().col + Scores::row(m, half), col = Warps().row + Scores::col(n, e);
      sums[row * Config::kKeys + col] = sum[m][half][n][e];
    });
  __syncthreads();
  for (int i = threadIdx.x; i < tiles.elements(); i += Config::kThreads) {
    const int row = i / tiles.cols, col = i % tiles.cols;
    double x = 0;
    for (int r = row; r < (tiles.every_row ? Config::kRows : row + 1); ++r)
      for (int c = col; c < (tiles.every_col ? Config::kKeys : col + 1); ++c) x += sums[r * Config::kKeys + c];
    if (call.partial)
      call.partial[(split * tiles.tiles + tile) * tiles.elements() + i] = x;
    else
      write_element(tiles, p.dbias, tile, i, x);
  }
}

// Adds up the shares.
template <class Config>
__global__ void __launch_bounds__(256) bias_gradient_sum_kernel(const __grid_constant__ BiasCall<Config> call) {
  const BiasTiles<Config>& tiles = call.tiles;
  const int64_t count = tiles.tiles * tiles.elements();
  const int64_t threads = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count; i += threads) {
    double x = 0;
    for (int64_t split = 0; split < tiles.splits; ++split) x += call.partial[split * count + i];
    write_element(tiles, call.p.dbias, i / tiles.elements(), i % tiles.elements(), x);
  }
}

template <class T>
using Config = GeneralBackwardConfig<T, FAE_HEAD_DIM>;

template <class T>
void run(const BackwardProblem& p, void* workspace, void* stream) {
  using C = Config<T>;
  const BiasCall<C> call{p,
                         BiasTiles<C>(p),
                         BiasTiles<C>(p).shares() > 0 ? static_cast<double*>(workspace) : nullptr,
                         whole_vectors<T>(p.q, p.head_dim),
                         whole_vectors<T>(p.k, p.head_dim),
                         whole_vectors<T>(p.v, p.head_dim_v),
                         whole_vectors<T>(p.dout, p.head_dim_v),
                         precision_of(p)};
  cuda::launch("sm80 bias gradient", bias_gradient_kernel<T, C>,
               cuda::Grid{call.tiles.tiles * call.tiles.splits, C::kThreads, BiasMemory<T, C>::kBytes}, stream, call);
  if (!call.partial) return;
  const int64_t elements = call.tiles.tiles * call.tiles.elements();
  cuda::launch("sm80 bias gradient sum", bias_gradient_sum_kernel<C>,
               cuda::Grid{.blocks = ceil_div(elements, 256), .threads = 256, .loops = true}, stream, call);
}

template <class C>
size_t workspace_of(const BackwardProblem& p) {
  const BiasTiles<C> tiles(p);
  return static_cast<size_t>(tiles.shares()) * sizeof(double);
}

}  // namespace

template <>
size_t bias_gradient_workspace<FAE_HEAD_DIM>(const BackwardProblem& p) {
  return p.dtype == DType::float32 ? workspace_of<Config<float>>(p) : workspace_of<Config<__half>>(p);
}

template <>
void bias_gradient<FAE_HEAD_DIM>(const BackwardProblem& p, void* workspace, void* stream) {
  switch (p.dtype) {
    case DType::bfloat16:
      return run<__nv_bfloat16>(p, workspace, stream);
    case DType::float16:
      return run<__half>(p, workspace, stream);
    case DType::float32:
      return run<float>(p, workspace, stream);
    case DType::float64:
      break;  // declined
  }
}

}  // namespace fae::sm80
