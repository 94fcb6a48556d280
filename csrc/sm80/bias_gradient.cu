#include "../core/schedule.h"
#include "../cuda/launch.h"
#include "kernels.h"
#include "recompute.h"

// dbias, where the backward does not write it, above all of a bias that several scores share, in a pass of its own: a
// thread block owns a tile of dbias, or one of a few shares of it, and visits all blocks of scores that fall into it.
// Sums have a fixed order, and nothing of size S x S exists besides dbias. That recomputes S and dP, two products of
// seven; only calls whose bias wants a gradient pay.
//
// No operand stays in shared memory from one visit to the next. Each product has half of them: while one is computed,
// the operands of the other arrive.

namespace fae::sm80 {
namespace {

constexpr int64_t kTasks = 512;  // enough thread blocks to fill a GPU

// How dbias is cut. A dimension that broadcasts has one tile, and its blocks are visited one after the other.
template <class Config>
struct BiasTiles {
  bool every_row, every_col;
  int batches, heads, row_blocks, col_blocks;  // that share a tile
  int rows, cols;                              // of a tile
  uint32_t row_tiles, col_tiles, size_head;
  int64_t tiles, splits;

  explicit BiasTiles(const BackwardProblem& p) {
    const ScoreView& view = p.dbias;
    every_row = view.size_row == 1;
    every_col = view.size_col == 1;
    batches = static_cast<int>(view.size_batch == 1 ? p.batch : 1);
    heads = static_cast<int>(view.size_head == 1 ? p.heads : 1);
    row_blocks = static_cast<int>(every_row ? ceil_div(p.max_seqlen_q, Config::kRows) : 1);
    col_blocks = static_cast<int>(every_col ? ceil_div(p.max_seqlen_k, Config::kKeys) : 1);
    rows = every_row ? 1 : Config::kRows;
    cols = every_col ? 1 : Config::kKeys;
    row_tiles = static_cast<uint32_t>(ceil_div(view.size_row, rows));
    col_tiles = static_cast<uint32_t>(ceil_div(view.size_col, cols));
    size_head = static_cast<uint32_t>(view.size_head);
    tiles = view.size_batch * view.size_head * row_tiles * col_tiles;
    splits = std::clamp<int64_t>(kTasks / tiles, 1, std::max<int64_t>(1, blocks()));
  }
  FAE_INLINE int64_t blocks() const { return int64_t{batches} * heads * row_blocks * col_blocks; }
  FAE_INLINE int elements() const { return rows * cols; }
  FAE_INLINE int64_t shares() const { return splits > 1 ? splits * tiles * elements() : 0; }  // of elements

  // Of a tile in dbias, or of a block of scores: batch, head, first row and first key.
  struct Place {
    int batch, head, row, key;
  };
  // In 32 bits, as many as a grid has: a division of 64 takes a GPU long.
  FAE_INLINE Place place(uint32_t tile) const {
    const uint32_t line = tile / col_tiles, rest = line / row_tiles, batch = rest / size_head;
    return {static_cast<int>(batch), static_cast<int>(rest - batch * size_head),
            static_cast<int>(line - rest * row_tiles) * rows, static_cast<int>(tile - line * col_tiles) * cols};
  }
  // Block number i of a tile's, and the one after it.
  FAE_INLINE Place block(const Place& tile, int64_t i) const {
    const int64_t line = i / col_blocks, rest = line / row_blocks;
    return {tile.batch + static_cast<int>(rest / heads), tile.head + static_cast<int>(rest % heads),
            tile.row + static_cast<int>(line % row_blocks) * Config::kRows,
            tile.key + static_cast<int>(i % col_blocks) * Config::kKeys};
  }
  FAE_INLINE void advance(Place& block) const {
    if (col_blocks > 1) {
      if ((block.key += Config::kKeys) < col_blocks * Config::kKeys) return;
      block.key = 0;
    }
    if (row_blocks > 1) {
      if ((block.row += Config::kRows) < row_blocks * Config::kRows) return;
      block.row = 0;
    }
    if (heads > 1) {
      if (++block.head < heads) return;
      block.head = 0;
    }
    ++block.batch;
  }
};

template <class Config>
struct BiasCall {
  BackwardProblem p;
  BiasTiles<Config> tiles;
  double* partial;  // [split][tile][element]; null: tiles are not shared, and dbias is written at once
  int group;        // heads that share a KV head
  Precision precision;
  cuda::ScoreConstants constants;
};

// 16 bytes to global memory, or the first `count` elements of them.
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const uint4& bytes, int count) {
  constexpr int kChunk = 16 / sizeof(T);
  if (count >= kChunk && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = bytes;
    return;
  }
  T elements[kChunk];
  memcpy(static_cast<void*>(elements), &bytes, 16);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) to[i] = elements[i];
}

// Of 16-bit products, single precision leaves nothing to wish for. Of float, an element may be a sum over so many
// scores that its rounding would be larger than theirs.
template <class T>
using BiasSum = std::conditional_t<sizeof(T) == 2, float, double>;

template <class T, class Config>
struct BiasMemory {
  using Operands = ScoreOperands<T, Config>;
  static constexpr int kKeys = Operands::Keys::kBytes, kRows = Operands::Rows::kBytes;
  static constexpr int kStatistics = 2 * kKeys + 2 * kRows;
  // Instead, at the end: the sums, in rows so long that no two threads of a warp write to the same bank.
  static constexpr int kSumStride = Config::kKeys + 4;
  static constexpr int kSums = Config::kRows * kSumStride * static_cast<int>(sizeof(BiasSum<T>));
  static constexpr int kBytes = std::max(kStatistics + Config::kRows * 8, kSums);

  static __device__ Operands operands(uint32_t base) {
    return {{base + 2 * kKeys}, {base + 2 * kKeys + kRows}, {base}, {base + kKeys}, base + kStatistics};
  }
};

template <class F>
__device__ __forceinline__ void with_element_type(DType dtype, F&& f) {
  if (dtype == DType::float32)
    f(float{});
  else if (dtype == DType::bfloat16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}

// To an element of a tile, if that is in dbias.
template <class Place>
__device__ __forceinline__ void write_element(const ScoreView& view, const Place& tile, int row, int col, double x) {
  if (tile.row + row >= view.size_row || tile.key + col >= view.size_col) return;
  const int64_t offset = score_offset(view, tile.batch, tile.head, tile.row + row, tile.key + col);
  with_element_type(view.dtype, [&](auto zero) {
    using E = decltype(zero);
    static_cast<E*>(view.data)[offset] = E(static_cast<float>(x));
  });
}

template <class T, class Config>
class BiasGradientTask {
  using Memory = BiasMemory<T, Config>;
  using Operands = ScoreOperands<T, Config>;
  using Place = typename BiasTiles<Config>::Place;
  using Warps = ScoreWarps<Config>;
  using Recompute = sm80::Recompute<T, Config, true>;
  using Scores = typename Recompute::Scores;
  // Rows of which terms and dropout bits are there at a time: 168 registers do not hold those of more.
  using Part = cuda::TransposedAccumulator<2, Warps::M>;
  using Sum = BiasSum<T>;

 public:
  __device__ explicit BiasGradientTask(const BiasCall<Config>& call)
      : call_(call),
        p_(call.p),
        tiles_(call.tiles),
        operands_(Memory::operands(shared_offset(dynamic_shared_memory()))) {}

  __device__ void run() {
    const Share share(tiles_);
    left_ = static_cast<int>(tiles_.blocks());
    next_ = share.place;
    if (tiles_.splits > 1) {
      const int64_t first = share.split * tiles_.blocks() / tiles_.splits;
      left_ = static_cast<int>((share.split + 1) * tiles_.blocks() / tiles_.splits - first);
      next_ = tiles_.block(share.place, first);
    }
    find_visible();
    const bool any = left_ > 0;
    copy_scores_operands();
    while (left_ > 0) visit();
    if (!any && !call_.partial) return;  // dbias has zeros there
    __syncthreads();
    share_sums();
    __syncthreads();
    write();
  }

 private:
  // What this thread block has.
  struct Share {
    uint32_t tile;
    int64_t split;
    Place place;
    __device__ explicit Share(const BiasTiles<Config>& tiles)
        : tile(blockIdx.x), split(tile / static_cast<uint32_t>(tiles.tiles)) {
      tile -= static_cast<uint32_t>(split * tiles.tiles);
      place = tiles.place(tile);
    }
  };

  // Goes on to the first block from next_ on of which some row sees something. There is none where left_ becomes 0.
  __device__ __forceinline__ void find_visible() {
    for (; left_ > 0; skip()) {
      const Sequence s = sequence_of(p_, next_.batch);
      const cuda::DeviceBand band = band_of<int>(p_, s);
      const auto seen = band.any(next_.row, min(next_.row + Config::kRows, band.seqlen_q));
      if (!seen.empty() && seen.begin < next_.key + Config::kKeys && seen.end > next_.key) return;
    }
  }
  __device__ __forceinline__ void skip() {
    --left_;
    tiles_.advance(next_);
  }

  // Adds the gradient of the scores of the block next_, whose Q and K are on their way, and goes on to the one after.
  __device__ __forceinline__ void visit() {
    const Place block = next_;
    const cuda::DeviceBand band = band_of<int>(p_, sequence_of(p_, block.batch));
    const Recompute recompute(p_, call_.constants, block.batch, block.head, band, call_.precision);
    const Warps warp;
    const int row = block.row + warp.col, key = block.key + warp.row;
    Scores prob, ds;
    wait_copies<0>();
    __syncthreads();  // dO and V of the block before have been used
    copy_gradient_operands();
    if (Warps::exists()) {
      recompute.multiply_keys(operands_.k, operands_.q, warp.col, prob);
#pragma unroll
      for (int first = 0; first < Scores::kRowPieces; first += Part::kRowPieces) {
        Part part = rows_of(prob, first);
        recompute.apply_terms(part, row + 8 * first, key, [](int, int, int, int, float) {});
        Part::for_each([&](int m, int half, int n, int e) { prob.at(first + m, half, n, e) = part.at(m, half, n, e); });
      }
    }
    skip();
    find_visible();
    wait_copies<0>();
    __syncthreads();  // Q and K have been used
    copy_scores_operands();
    if (!Warps::exists()) return;
    recompute.multiply_keys(operands_.v, operands_.dout, warp.col, ds);
#pragma unroll
    for (int first = 0; first < Scores::kRowPieces; first += Part::kRowPieces) {
      const int part_row = 8 * first;
      Part part = rows_of(prob, first), part_ds = rows_of(ds, first);
      recompute.differentiate(operands_.statistics, warp.col + part_row, row + part_row, key, part, part_ds,
                              [&](int m, int half, int n, int e) {
                                if (row + part_row + Part::row(m, half) < band.seqlen_q)
                                  sum_[first + m][half][n][e] += part_ds.at(m, half, n, e);
                              });
    }
  }
  static __device__ __forceinline__ Part rows_of(const Scores& s, int first) {
    Part part;
    Part::for_each([&](int m, int half, int n, int e) { part.at(m, half, n, e) = s.at(first + m, half, n, e); });
    return part;
  }

  // Start the copies of what S and what dP of the block next_ is computed from.
  __device__ __forceinline__ void copy_scores_operands() const {
    if (left_ > 0) {
      const Sequence s = sequence_of(p_, next_.batch);
      copy_rows_of(operands_.q, p_.q, s, p_.head_dim);
      copy_keys_of(operands_.k, p_.k, s, p_.head_dim);
    }
    commit_copies();
  }
  __device__ __forceinline__ void copy_gradient_operands() const {
    const Sequence s = sequence_of(p_, next_.batch);
    copy_rows_of(operands_.dout, p_.dout, s, p_.head_dim_v);
    copy_keys_of(operands_.v, p_.v, s, p_.head_dim_v);
    copy_statistics<Config>(operands_.statistics, p_, next_.batch, s.q_start + next_.row, next_.head,
                            static_cast<int>(s.seqlen_q) - next_.row);
    commit_copies();
  }
  __device__ __forceinline__ void copy_rows_of(const typename Operands::Rows& to, const TensorView& view,
                                               const Sequence& s, int64_t dim) const {
    const int rows = static_cast<int>(s.seqlen_q) - next_.row;
    copy_rows<Config::kThreads>(to, GlobalRows<T>(view, next_.batch, s.q_start + next_.row, next_.head, rows, dim, 0));
  }
  __device__ __forceinline__ void copy_keys_of(const typename Operands::Keys& to, const TensorView& view,
                                               const Sequence& s, int64_t dim) const {
    const int keys = static_cast<int>(s.seqlen_k) - next_.key;
    copy_rows<Config::kThreads>(
        to, GlobalRows<T>(view, next_.batch, s.k_start + next_.key, next_.head / call_.group, keys, dim, 0));
  }

  // The tile's sums through shared memory, where those that share an element of dbias meet.
  __device__ Sum* sums(int row) const {
    return reinterpret_cast<Sum*>(dynamic_shared_memory()) + row * Memory::kSumStride;
  }
  __device__ __forceinline__ void share_sums() const {
    if (!Warps::exists()) return;
    const Warps warp;
    Scores::for_each([&](int m, int half, int n, int e) {
      sums(warp.col + Scores::row(m, half))[warp.row + Scores::col(n, e)] = sum_[m][half][n][e];
    });
  }

  __device__ __forceinline__ void write() const {
    const Share share(tiles_);
    if (!call_.partial && !tiles_.every_row && !tiles_.every_col && p_.dbias.stride_col == 1)
      return with_element_type(p_.dbias.dtype, [&](auto zero) { write_tile<decltype(zero)>(share.place); });
    for (int i = static_cast<int>(threadIdx.x); i < tiles_.elements(); i += Config::kThreads) {
      const int row = tiles_.every_col ? i : i / Config::kKeys, col = tiles_.every_col ? 0 : i % Config::kKeys;
      double x = 0;
      for (int r = row; r < (tiles_.every_row ? Config::kRows : row + 1); ++r)
        for (int c = col; c < (tiles_.every_col ? Config::kKeys : col + 1); ++c) x += sums(r)[c];
      if (call_.partial)
        call_.partial[(share.split * tiles_.tiles + share.tile) * tiles_.elements() + i] = x;
      else
        write_element(p_.dbias, share.place, row, col, x);
    }
  }

  // Where every element is the sum of one thread.
  template <class E>
  __device__ __forceinline__ void write_tile(const Place& place) const {
    constexpr int kChunk = 16 / sizeof(E), kChunks = Config::kKeys / kChunk;
    const ScoreView& view = p_.dbias;
    E* const first = static_cast<E*>(view.data) + score_offset(view, place.batch, place.head, place.row, place.key);
    const int rows = static_cast<int>(view.size_row) - place.row, cols = static_cast<int>(view.size_col) - place.key;
    for (int i = static_cast<int>(threadIdx.x); i < Config::kRows * kChunks; i += Config::kThreads) {
      const int row = i / kChunks, col = i % kChunks * kChunk;
      if (row >= rows || col >= cols) continue;
      const auto chunk = *reinterpret_cast<const Chunk<Sum, kChunk>*>(sums(row) + col);
      Chunk<E, kChunk> elements;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) elements.x[j] = E(static_cast<float>(chunk.x[j]));
      uint4 bytes;
      memcpy(&bytes, &elements, 16);
      store_chunk(first + row * view.stride_row + col, bytes, cols - col);
    }
  }
  template <class E, int kSize>
  struct alignas(16) Chunk {
    E x[kSize];
  };

  const BiasCall<Config>& call_;
  const BackwardProblem& p_;
  const BiasTiles<Config>& tiles_;
  const Operands operands_;
  int left_;  // blocks from next_ on
  Place next_;
  Sum sum_[Scores::kRowPieces][2][Scores::kColPieces][2] = {};
};

// Two thread blocks per multiprocessor; for float, beyond 128 columns, there are not the registers.
template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, sizeof(T) == 2 || Config::kDim <= 128 ? 2 : 1)
    bias_gradient_kernel(const __grid_constant__ BiasCall<Config> call) {
  BiasGradientTask<T, Config>(call).run();
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
    const auto tile = static_cast<uint32_t>(i / tiles.elements());
    const int element = static_cast<int>(i % tiles.elements());
    write_element(call.p.dbias, tiles.place(tile), element / tiles.cols, element % tiles.cols, x);
  }
}

template <class T>
using Config = BiasGradientConfig<T, FAE_HEAD_DIM>;

template <class T>
void run(const BackwardProblem& p, void* workspace, void* stream) {
  using C = Config<T>;
  const BiasCall<C> call{p,
                         BiasTiles<C>(p),
                         BiasTiles<C>(p).shares() > 0 ? static_cast<double*>(workspace) : nullptr,
                         static_cast<int>(p.heads / p.heads_kv),
                         precision_of(p),
                         cuda::ScoreConstants(p)};
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
