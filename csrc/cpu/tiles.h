#pragma once

#include "simd.h"

// Operands in bfloat16 are packed into tiles of 16 rows of 64 bytes. A tile of a left operand A is 16 x 32 elements,
// one of a right operand B is 32 x 16 with pairs of rows interleaved ("VNNI"): row k is B[2k][n] and B[2k + 1][n] for
// n = 0 .. 15. AMX's product of tiles and AVX-512's dot product of pairs both read them like that.

namespace fae::cpu::FAE_LEVEL {

constexpr int64_t kTileSize = 16;               // rows of a tile, and floats in a row
constexpr int64_t kTileDepth = 32;              // bfloat16 in a row
constexpr int64_t kTileElements = 512;          // bfloat16 in a tile
static_assert(Vec<float>::width == kTileSize);  // a vector of floats is a row of C

// Tiles of one operand of a product of blocks: its first pair is (data, data + pair), and the next ones along the depth
// are `step` elements further each.
struct TilePairs {
  const bfloat16* data;
  int64_t pair, step;
};

// Every product of the kernels is one of blocks, block_product<Accumulate>(a, b, depth, c, ld): C (+)= A B over `depth`
// tiles for c[32][32] of a row-major matrix whose rows are ld floats apart. A task has a TileUnit while it multiplies.

}  // namespace fae::cpu::FAE_LEVEL

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "dot_product.h"
#else
#include "tile_unit.h"
#endif
