#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// A software model of CUDA thread blocks, so that a machine without a GPU can run the kernels. Every CUDA thread is a
// fiber; a fiber runs until it reaches an operation that needs others (of its warp, block or cluster) and waits there.
// Clusters, most of one block, run one after the other, in the order of their index; of blocks that wait for others, as
// many run side by side as the device has multiprocessors.
//
// What goes wrong only sometimes on a GPU goes wrong here every time:
// - Asynchronous copies and products happen when they are waited for, not before: operands overwritten too early and
//   results read too early are wrong. Tensor copies arrive only when no thread can go on without them.
// - Shared memory starts out as NaN.
// - The lanes of a warp must meet in the same operation: anything else aborts and says where each one is.
// - FAE_EMULATOR_ORDER=backward runs the warps in the opposite order, which shows missing barriers.
// - FAE_EMULATOR_SLOW=n lets one after the other of the blocks that run side by side fall behind, for n rounds of the
//   scheduler, which shows what should wait for it.
//
// FAE_EMULATOR_SHARED is the shared memory of a block, in bytes, FAE_EMULATOR_MULTIPROCESSORS how many there are, and
// FAE_EMULATOR_FREE how many of those other work leaves to blocks that wait for others.

namespace fae::emulator {

struct Index {
  unsigned x = 0;
};

constexpr int kWarpThreads = 32;

// What one lane brings to an operation of its whole warp and where its result goes.
struct LaneOperands {
  const void* in;
  void* out;
};
// The operation: all 32 lanes at once.
using WarpOperation = void (*)(const LaneOperands (&lanes)[kWarpThreads]);

// Reports a mistake of the kernel and where every thread is, and aborts.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_outside(uint32_t offset);

// What kernels ask for most often.
struct RunningBlock {
  unsigned index = 0, thread = 0;  // of the thread that runs
  std::vector<char> shared;
};
extern RunningBlock* running_block;

// The running thread.
inline Index thread_index() { return {running_block->thread}; }
inline Index block_index() { return {running_block->index}; }
Index grid_size();
inline char* shared_memory() { return running_block->shared.data(); }

// Waits until every lane of the warp has come here with the same `name`; the last one performs the operation.
void warp_operation(const char* name, WarpOperation operation, const void* in, void* out);
// Waits until every thread of the block that has not returned is here.
void block_barrier();

// cp.async and its groups, per thread. `valid` bytes come from global memory, the rest of `bytes` is zero.
void copy_later(uint32_t shared_offset, const void* global, int bytes, int valid);
void close_copy_group();
void wait_for_copies(int groups_left);

// An address in shared memory is an offset, and above it the block's number in its cluster.
constexpr int kRankShift = 24;
constexpr uint32_t offset_of(uint32_t address) { return address & ((uint32_t{1} << kRankShift) - 1); }

// `bytes` of shared memory at an address; aborts where that is outside.
inline char* shared_bytes(uint32_t address, int bytes) {
  std::vector<char>& shared = running_block->shared;
  const uint32_t offset = offset_of(address);
  if (offset + static_cast<size_t>(bytes) > shared.size() || offset % bytes != 0) fail_outside(offset);
  return shared.data() + offset;
}

// A number of global memory. A thread that looks at it again and again lets all others run in between.
int poll(const int* global);
// Until nobody else can go on.
void sleep();

// The block's number in its cluster; where all threads of the cluster wait for each other.
int cluster_rank();
void cluster_barrier();
// The same place in the shared memory of another block of the cluster, for the two operations below.
inline uint32_t in_block(uint32_t address, int rank) {
  return offset_of(address) | static_cast<uint32_t>(rank) << kRankShift;
}
// 16 bytes that arrive when no thread can go on without them, counted by a barrier of the same block.
void store_later(uint32_t address, const void* bytes, uint32_t barrier);
void arrive_in_block(uint32_t barrier);

// mbarrier: its phase ends when `count` threads have arrived and all bytes that are expected have come.
void init_barrier(uint32_t address, int count);
void expect_at_barrier(uint32_t address, int bytes);
void arrive_at_barrier(uint32_t address, int expected_bytes);
void wait_for_barrier(uint32_t address, int parity);

// A tensor of up to four dimensions, the first one contiguous, and the box of it (of two dimensions) that a copy moves.
struct TensorMap {
  char* data = nullptr;
  int64_t extents[4] = {}, strides[4] = {};  // in elements and in bytes
  int element_size = 0, box_cols = 0, box_rows = 0;
  bool swizzled = true;
};
struct BoxCopy {
  TensorMap map;  // its own: the thread that starts the copy may be gone when that happens
  int position[4];
  uint32_t shared_offset;
};
// To shared memory (rows of 128 or 64 bytes with the swizzle where the map has it, others as they are; zeros where the
// tensor ends), counted by a barrier; and back to the tensor, in groups of the thread that starts it.
void load_box_later(const BoxCopy& copy, uint32_t barrier);
void store_box_later(const BoxCopy& copy);
void close_store_group();
void wait_for_stores(int groups_left);

// Work of the running warp that happens when it waits for it; for use inside of a WarpOperation.
void defer(std::function<void()> work);
void close_deferred_group();
void wait_for_deferred(int groups_left);

// sum += a b, for matrices by rows, the columns of b in eights: what tensor cores do.
void add_product(int rows, int cols, int depth, const float* a, const float* b, float* sum);

// Runs `kernel` on every thread of a grid of one dimension, `together` blocks of it at a time: a cluster, whose size
// divides the grid, or else blocks that may wait for each other.
void run_grid(const char* name, int64_t blocks, int threads, size_t shared, int64_t together,
              const std::function<void()>& kernel);

}  // namespace fae::emulator
