#include <cstdint>
#include <vector>

#include "../core/macros.h"
#include "../sm90/tensor_map.h"
#include "../sm90/tile.h"

// Hopper's instructions alone, on numbers that tell where they come from, for tests: what the model says of layouts is
// written down a second time here, as plain loops.

namespace fae::sm90 {
namespace {

using T = __nv_bfloat16;
constexpr int kRows = 72, kCols = 128, kHeads = 2;  // of the tensor: a box of 64 rows can reach beyond its end

struct PrimitivesCall {
  TensorMap in, out;
  int row;
  float *straight, *transposed, *shared;  // [64][64]: A A^T, A A, A A for the square A of the first 64 columns
  float* half;                            // [64][32]: A^T times the right half of A
};

// One warpgroup: loads rows of head 1, multiplies them, stores them back as head 0 of another tensor.
void primitives_kernel(const PrimitivesCall call) {
  using Tile = SharedTile<T, 64, kCols>;
  const Tile tile{sm80::shared_offset(sm80::dynamic_shared_memory())};
  const uint32_t barrier = tile.base + Tile::kBytes;
  if (threadIdx.x == 0) init_barrier(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expecting(barrier, Tile::kBytes);
    for (int block = 0; block < 2; ++block)
      load_box(tile.address(0, 64 * block), call.in, 64 * block, call.row, 1, 0, barrier);
  }
  wait(barrier, 0);

  const SharedTile<T, 64, 64> square{tile.base};
  Accumulator<1, 8> s, o;
  start_straight(s, square, square);
  wait_products<0>();
  uint32_t fragments[4][4];
  const int row = warp_index() * 16 + lane_index() / 4;
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i)
      fragments[k][i] = sm80::load_shared(square.address(row + i % 2 * 8, 16 * k + i / 2 * 8 + lane_index() % 4 * 2));
  o.fill(0);
  start_transposed(o, fragments, square);
  wait_products<0>();
  // Factors that lie in shared memory by columns, and one that begins in the middle of its lines.
  Accumulator<1, 8> shared;
  shared.fill(0);
  multiply_transposed(shared, square, square);
  Accumulator<1, 4> right_half;
  const Descriptor left(square.base), right(square.address(0, 32));
  for (int k = 0; k < 4; ++k)
    multiply_async<true, true>(right_half.x[0], left.at(k * 16 * cuda::kSwizzleBytes),
                               right.at(k * 16 * cuda::kSwizzleBytes), k > 0, T{});
  commit_products();
  wait_products<0>();
  right_half.for_each([&](int m, int half, int n, int e) {
    call.half[(warp_index() * 16 + s.row(m, half)) * 32 + s.col(n, e)] = right_half.at(m, half, n, e);
  });
  s.for_each([&](int m, int half, int n, int e) {
    const int i = (warp_index() * 16 + s.row(m, half)) * 64 + s.col(n, e);
    call.straight[i] = s.at(m, half, n, e);
    call.transposed[i] = o.at(m, half, n, e);
    call.shared[i] = shared.at(m, half, n, e);
  });

  if (threadIdx.x == 0) {
    for (int block = 0; block < 2; ++block)
      store_box(call.out, 64 * block, call.row, 0, 0, tile.address(0, 64 * block));
    commit_stores();
    wait_stores<0>();
  }
}

// Two thread blocks of one warp: the first sends 16 bytes a lane, as often as the second has made room for them.
void exchange_kernel(uint32_t (*received)[32][4], int rounds) {
  const uint32_t place = sm80::shared_offset(sm80::dynamic_shared_memory()), full = place + 32 * 16, empty = full + 8;
  const int lane = lane_index();
  if (lane == 0) {
    init_barrier(full, 1);
    init_barrier(empty, 1);
  }
  sync_cluster();
  for (int round = 0; round < rounds; ++round) {
    const auto parity = static_cast<uint32_t>(round % 2);
    if (cluster_rank() == 0) {
      wait(empty, parity ^ 1);
      const auto number = static_cast<uint32_t>(round * 128 + lane * 4);
      store_async(in_block(place + 16 * lane, 1), {number, number + 1, number + 2, number + 3}, in_block(full, 1));
    } else {
      arrive_expecting_if(full, 32 * 16, lane == 0);
      wait(full, parity);
      const uint4 x = sm80::load_shared_16_bytes(place + 16 * lane);
      memcpy(received[round][lane], &x, sizeof(x));
      __syncwarp();
      arrive_in_block_if(in_block(empty, 0), lane == 0);
    }
  }
  sync_cluster();
}

bool exchange_arrives() {
  constexpr int kRounds = 3;
  uint32_t received[kRounds][32][4] = {};
  emulator::run_grid("exchange", 2, 32, 32 * 16 + 16, 2, [&] { exchange_kernel(received, kRounds); });
  for (uint32_t i = 0; i < kRounds * 128; ++i)
    if (received[i / 128][i / 4 % 32][i % 4] != i) return false;
  return true;
}

}  // namespace

// 0, or the number of the first check that failed.
extern "C" FAE_API int fae_check_sm90_primitives() {
  if (!exchange_arrives()) return 7;
  std::vector<T> in(kRows * kHeads * kCols), out(in.size(), T(-1.0f));
  const auto index = [](int row, int head, int col) { return (row * kHeads + head) * kCols + col; };
  for (int row = 0; row < kRows; ++row)
    for (int head = 0; head < kHeads; ++head)
      for (int col = 0; col < kCols; ++col) in[index(row, head, col)] = T(float((row * 7 + col * 3 + head) % 13 - 6));
  for (const int first : {0, 8, 24}) {
    const auto map = [&](std::vector<T>& data) {
      return make_tensor_map(DType::bfloat16, {data.data(), 0, kHeads * kCols, kCols}, {kCols, kRows, kHeads, 1}, 64);
    };
    std::vector<float> straight(64 * 64), transposed(64 * 64), shared(64 * 64), half(64 * 32);
    const PrimitivesCall call{map(in), map(out), first, straight.data(), transposed.data(), shared.data(), half.data()};
    emulator::run_grid("primitives", 1, 128, 64 * kCols * 2 + 8, 1, [&] { primitives_kernel(call); });
    const auto a = [&](int row, int col) {
      return first + row < kRows ? __bfloat162float(in[index(first + row, 1, col)]) : 0.0f;
    };
    for (int i = 0; i < 64; ++i)
      for (int j = 0; j < 64; ++j) {
        float by_rows = 0, by_columns = 0, both_by_columns = 0;
        for (int k = 0; k < 64; ++k) {
          by_rows += a(i, k) * a(j, k);
          by_columns += a(i, k) * a(k, j);
          both_by_columns += a(k, i) * a(k, j);
        }
        if (straight[i * 64 + j] != by_rows) return 1;
        if (transposed[i * 64 + j] != by_columns) return 2;
        if (shared[i * 64 + j] != by_columns) return 5;
        if (j >= 32 && half[i * 32 + j - 32] != both_by_columns) return 6;
      }
    for (int row = first; row < kRows && row < first + 64; ++row)
      for (int col = 0; col < kCols; ++col) {
        if (__bfloat162float(out[index(row, 0, col)]) != a(row - first, col)) return 3;
        if (__bfloat162float(out[index(row, 1, col)]) != -1.0f) return 4;
      }
  }
  return 0;
}

}  // namespace fae::sm90
