#pragma once

#include "tiles.h"

// Products of tiles on the tile unit of AMX: eight tiles of 16 rows of 64 bytes, and one product of them. Level amx
// issues the instructions; level amx_emulated runs the same kernels on a model in plain C++.

namespace fae::cpu::FAE_LEVEL {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// Makes the tiles usable on this thread for as long as it lives; the process asked for permission in level.cpp.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// The memory clobbers keep the compiler's own loads and stores on their side of a tile's.
template <int Tile>
FAE_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
FAE_INLINE void tile_load(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
FAE_INLINE void tile_store(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int C, int A, int B>
FAE_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct TileUnit {
  alignas(64) static inline thread_local char tiles[8][kTileSize][64];
  TileUnit() {}
  ~TileUnit() { std::memset(tiles, 0xff, sizeof(tiles)); }  // NaN: a tile must not survive its task
};

template <int Tile>
void tile_zero() {
  std::memset(TileUnit::tiles[Tile], 0, sizeof(TileUnit::tiles[Tile]));
}
template <int Tile>
void tile_load(const void* rows, int64_t stride_bytes) {
  for (int64_t i = 0; i < kTileSize; ++i)
    std::memcpy(TileUnit::tiles[Tile][i], static_cast<const char*>(rows) + i * stride_bytes, 64);
}
template <int Tile>
void tile_store(void* rows, int64_t stride_bytes) {
  for (int64_t i = 0; i < kTileSize; ++i)
    std::memcpy(static_cast<char*>(rows) + i * stride_bytes, TileUnit::tiles[Tile][i], 64);
}
template <int C, int A, int B>
void tile_multiply() {
  using Pairs = NativeVector<uint32_t, kTileSize>::type;
  const auto floats = [](Pairs bits) { return Vec<float>(reinterpret_cast<Vec<float>::Native>(bits)); };
  Pairs b[kTileSize];
  std::memcpy(b, TileUnit::tiles[B], sizeof(b));
  for (int64_t i = 0; i < kTileSize; ++i) {
    uint32_t a[kTileSize];
    std::memcpy(a, TileUnit::tiles[A][i], sizeof(a));
    float* c = reinterpret_cast<float*>(TileUnit::tiles[C][i]);
    Vec<float> sum = Vec<float>::load(c);
    for (int64_t k = 0; k < kTileSize; ++k)
      sum += floats(b[k] << 16) * bits_to_float(a[k] << 16) +
             floats(b[k] & 0xffff0000u) * bits_to_float(a[k] & 0xffff0000u);
    sum.store(c);
  }
}

#endif

// C is a block of 2 x 2 tiles, which needs half the loads of single tiles: tiles 0 to 3 hold C, 4 and 5 A, 6 and 7 B.
template <bool Accumulate>
FAE_INLINE void block_product(TilePairs a, TilePairs b, int64_t depth, float* c, int64_t ld) {
  if constexpr (Accumulate) {
    tile_load<0>(c, ld * 4);
    tile_load<1>(c + kTileSize, ld * 4);
    tile_load<2>(c + kTileSize * ld, ld * 4);
    tile_load<3>(c + kTileSize * ld + kTileSize, ld * 4);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t k = 0; k < depth; ++k, a.data += a.step, b.data += b.step) {
    tile_load<4>(a.data, 64);
    tile_load<6>(b.data, 64);
    tile_multiply<0, 4, 6>();
    tile_load<7>(b.data + b.pair, 64);
    tile_multiply<1, 4, 7>();
    tile_load<5>(a.data + a.pair, 64);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(c, ld * 4);
  tile_store<1>(c + kTileSize, ld * 4);
  tile_store<2>(c + kTileSize * ld, ld * 4);
  tile_store<3>(c + kTileSize * ld + kTileSize, ld * 4);
}

}  // namespace fae::cpu::FAE_LEVEL
