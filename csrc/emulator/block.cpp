#include "block.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "../core/macros.h"

namespace fae::emulator {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
// The stacks of a warp begin at different lines of a page, so that what its lanes have at the same depth fits into the
// first cache, which looks at the place in a page only.
constexpr size_t kPageBytes = 4096, kStackShift = kPageBytes / kWarpThreads;

using JumpBuffer = void* [5];  // as GCC and Clang have it; they leave the registers to the function that goes on

struct Copy {
  uint32_t shared_offset;
  const void* global;
  int bytes, valid;
};

struct Fiber {
  JumpBuffer resume;
  ucontext_t start;  // used once, to enter the stack; after that jump buffers switch without a system call
  std::unique_ptr<char[]> stack;
  bool started = false;
  uint32_t barrier = 0;  // that it waits for, and the parity of the phase, where it waits in kMemoryBarrier
  int parity = 0;
  const int* polled = nullptr;  // the number that it looked at last, how often, and what it saw
  int looks = 0, seen = 0;
  bool in_vain = false;  // it has just looked and seen nothing new
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
  std::vector<BoxCopy> open_stores;
  std::deque<std::vector<BoxCopy>> stores;
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;  // that they have arrived at
  LaneOperands operands[kWarpThreads];
  std::vector<std::function<void()>> open_group;
  std::deque<std::vector<std::function<void()>>> groups;
};

struct Barrier {
  int count = 0, missing = 0;
  int64_t missing_bytes = 0;
  unsigned phase = 0;

  void end_phase_if_complete() {
    if (missing != 0 || missing_bytes != 0) return;
    ++phase;
    missing = count;
  }
};

struct BoxLoad {
  BoxCopy copy;
  uint32_t barrier;
};

struct RemoteStore {
  uint32_t address, barrier;  // as in_block() gives them
  char bytes[16];
};

struct Block;

struct Cluster {
  const char* kernel_name;
  const std::function<void()>* kernel;
  unsigned grid = 0;
  std::vector<std::unique_ptr<Block>> blocks;
  int at_barrier = 0, live = 0;
  std::deque<RemoteStore> stores;  // that have not arrived
  bool progress = false;           // since the scheduler set it to false: whether any thread has gone on
  JumpBuffer scheduler;
};

struct Block : RunningBlock {
  Cluster* cluster;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<const char*> waiting;  // by thread, the operation it waits in, or kReturned; null: it can run
  std::vector<Warp> warps;
  int at_barrier = 0, live = 0;
  std::map<uint32_t, Barrier> barriers;  // by their place in shared memory
  std::deque<BoxLoad> loads;             // that have not arrived

  Fiber* running = nullptr;
};

Block* block = nullptr;  // of the running thread
const char* const kBarrier = "__syncthreads";
const char* const kClusterBarrier = "barrier.cluster";
const char* const kMemoryBarrier = "mbarrier";
const char* const kPolling = "a loop that polls memory";
const char* const kSleeping = "__nanosleep";
const char* const kReturned = "return";
std::map<std::string, int64_t> grids;  // by the kernel's name, how many have run

void enter_block(Block& b) {
  block = &b;
  running_block = &b;
}

Barrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(offset_of(address));
  if (found == block->barriers.end()) fail("no mbarrier at " + std::to_string(offset_of(address)));
  return found->second;
}

// A phase has ended when the barrier is in one of the other parity.
bool has_ended(uint32_t address, int parity) { return static_cast<int>(barrier_at(address).phase % 2) != parity; }

bool can_run(unsigned index) {
  const char* const waiting = block->waiting[index];
  if (waiting != kMemoryBarrier) return !waiting;
  const Fiber& f = *block->fibers[index];
  return has_ended(f.barrier, f.parity);
}

// The functions that jump are not inlined: a jump back to the function that it is made from is not allowed.
[[noreturn, gnu::noinline]] void jump(JumpBuffer& to) { __builtin_longjmp(to, 1); }

[[noreturn, gnu::noinline]] void go_on_with(unsigned index) {
  Fiber& f = *block->fibers[index];
  block->running = &f;
  block->thread = index;
  if (f.started) jump(f.resume);
  f.started = true;
  setcontext(&f.start);
  fail("a thread does not start");
}

// From thread to scheduler and back are two switches: where another lane of the warp can run, one is enough.
[[gnu::noinline]] void suspend(const char* waiting) {
  block->waiting[block->thread] = waiting;
  if (waiting != kPolling && waiting != kSleeping) {  // one operation after a look in vain tells a warp of it
    if (!block->running->in_vain) block->cluster->progress = true;
    block->running->in_vain = false;
  }
  if (__builtin_setjmp(block->running->resume) != 0) return;
  for (unsigned next = block->thread + 1; next % kWarpThreads != 0; ++next)
    if (can_run(next)) go_on_with(next);
  jump(block->cluster->scheduler);
}

// A fiber runs one thread after the other.
void enter_fiber() {
  while (true) {
    (*block->cluster->kernel)();
    const Fiber& f = *block->running;
    if (!f.stores.empty() || !f.open_stores.empty()) fail("it leaves stores behind");
    --block->live;
    --block->cluster->live;
    suspend(kReturned);
  }
}

[[gnu::noinline]] void resume(unsigned index) {
  if (__builtin_setjmp(block->cluster->scheduler) == 0) go_on_with(index);
}

// For the next thread that it runs.
void prepare_fiber(Fiber& f, unsigned index) {
  f.polled = nullptr;
  f.open_group.clear();
  f.groups.clear();
  if (f.stack) return;
  f.stack.reset(new char[kStackBytes + kPageBytes]);
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get() + index % kWarpThreads * kStackShift;
  f.start.uc_stack.ss_size = kStackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, enter_fiber, 0);
}

// f(shared address, global address or null) for every 16 bytes of a box.
template <class F>
void for_each_chunk(const BoxCopy& copy, F&& f) {
  const TensorMap& map = copy.map;
  const int row_bytes = map.box_cols * map.element_size;
  const uint32_t swizzle = !map.swizzled ? 0 : row_bytes == 128 ? 7 : row_bytes == 64 ? 3 : 0;
  if (copy.shared_offset % 128 != 0 || (map.swizzled && row_bytes > 128)) fail("a box that the swizzle does not fit");
  for (int row = 0; row < map.box_rows; ++row)
    for (int byte = 0; byte < row_bytes; byte += 16) {
      const int64_t position[4] = {copy.position[0] + byte / map.element_size, int64_t{copy.position[1]} + row,
                                   copy.position[2], copy.position[3]};
      char* global = map.data;
      for (int d = 0; global && d < 4; ++d) {
        global += position[d] * map.strides[d];
        if (position[d] < 0 || position[d] >= map.extents[d]) global = nullptr;
      }
      const uint32_t plain = copy.shared_offset + static_cast<uint32_t>(row * row_bytes + byte);
      f(shared_bytes(plain ^ (plain >> 7 & swizzle) << 4, 16), global);
    }
}

void deliver_load(bool newest) {
  const BoxLoad load = newest ? block->loads.back() : block->loads.front();
  newest ? block->loads.pop_back() : block->loads.pop_front();
  int bytes = 0;
  for_each_chunk(load.copy, [&](char* shared, const char* global) {
    if (global)
      std::memcpy(shared, global, 16);
    else
      std::memset(shared, 0, 16);
    bytes += 16;
  });
  Barrier& barrier = barrier_at(load.barrier);
  barrier.missing_bytes -= bytes;
  barrier.end_phase_if_complete();
}

void deliver_store(Cluster& cluster) {
  const RemoteStore store = cluster.stores.front();
  cluster.stores.pop_front();
  enter_block(*cluster.blocks[store.address >> kRankShift]);
  std::memcpy(shared_bytes(store.address, 16), store.bytes, 16);
  Barrier& barrier = barrier_at(store.barrier);
  barrier.missing_bytes -= 16;
  barrier.end_phase_if_complete();
}

// Lets every thread of a block run as far as it gets, a warp at a time.
void advance(Block& of, bool backward) {
  const auto warps = static_cast<unsigned>(of.warps.size());
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = backward ? warps - 1 - i : i;
    for (bool moved = true; moved;) {
      moved = false;
      for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
        const unsigned index = warp * kWarpThreads + lane;
        enter_block(of);
        if (!can_run(index)) continue;
        resume(index);
        moved = true;
      }
    }
  }
}

// Lets the threads that wait at a barrier go on. Whether any does.
bool open_barrier(Block& of, const char* name) {
  const bool any = std::find(of.waiting.begin(), of.waiting.end(), name) != of.waiting.end();
  std::replace(of.waiting.begin(), of.waiting.end(), name, static_cast<const char*>(nullptr));
  return any;
}

// Until all threads of the cluster have returned. Those that poll look once before the others run. One block after the
// other is slow for so many rounds, if any: then it goes on where the others cannot.
void run_cluster(Cluster& cluster, bool backward, int64_t slow_rounds) {
  bool& progress = cluster.progress;
  bool all = true;  // whether none is left behind
  for (int64_t round = 0; cluster.live > 0; ++round) {
    const int64_t slow = slow_rounds > 0 ? round / slow_rounds % static_cast<int64_t>(cluster.blocks.size()) : -1;
    progress = false;
    for (int64_t place = 0; place < static_cast<int64_t>(cluster.blocks.size()); ++place) {
      const auto& b = cluster.blocks[place];
      if (place == slow && !all) continue;
      open_barrier(*b, kPolling);
      advance(*b, backward);
      if (b->at_barrier == 0 || b->at_barrier != b->live) continue;
      b->at_barrier = 0;
      open_barrier(*b, kBarrier);
      progress = true;
    }
    if (cluster.at_barrier > 0 && cluster.at_barrier == cluster.live) {
      cluster.at_barrier = 0;
      for (const auto& b : cluster.blocks) open_barrier(*b, kClusterBarrier);
      progress = true;
    }
    for (int64_t place = 0; place < static_cast<int64_t>(cluster.blocks.size()); ++place) {
      const auto& b = cluster.blocks[place];
      if (progress || b->loads.empty() || (place == slow && !all)) continue;
      enter_block(*b);
      deliver_load(backward);
      progress = true;
    }
    if (!progress && !cluster.stores.empty()) {
      deliver_store(cluster);
      progress = true;
    }
    if (!progress)
      for (const auto& b : cluster.blocks) progress |= open_barrier(*b, kSleeping);
    if (!progress && all) fail("no thread can go on");
    all = slow < 0 || !progress;
  }
}

void perform(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    char* const to = shared_bytes(copy.shared_offset, copy.bytes);
    std::memcpy(to, copy.global, copy.valid);
    std::memset(to + copy.valid, 0, copy.bytes - copy.valid);
  }
}

}  // namespace

RunningBlock* running_block = nullptr;

Index grid_size() { return {block->cluster->grid}; }

void warp_operation(const char* name, WarpOperation operation, const void* in, void* out) {
  const unsigned index = block->thread;
  Warp& warp = block->warps[index / kWarpThreads];
  if (warp.arrived == 0) warp.operation = name;
  if (warp.operation != name && warp.operation != std::string_view(name))
    fail(std::string("the lanes of a warp are not all in ") + name);
  warp.operands[index % kWarpThreads] = {in, out};
  if (++warp.arrived < kWarpThreads) return suspend(name);
  warp.arrived = 0;
  std::fill_n(block->waiting.begin() + index / kWarpThreads * kWarpThreads, kWarpThreads, nullptr);
  operation(warp.operands);
}

void block_barrier() {
  ++block->at_barrier;
  suspend(kBarrier);
}

void copy_later(uint32_t shared_offset, const void* global, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) fail("cp.async from a global address that is not aligned");
  block->running->open_group.push_back({shared_offset, global, bytes, valid});
}

void close_copy_group() {
  block->running->groups.push_back(std::move(block->running->open_group));
  block->running->open_group.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = block->running->groups;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front()) perform(groups.front());
}

void fail_outside(uint32_t offset) {
  fail("shared memory at " + std::to_string(offset) + " of " + std::to_string(block->shared.size()));
}

void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: kernel %s, block %u, thread %u: %s\n", block->cluster->kernel_name, block->index,
               block->thread, what.c_str());
  for (const auto& b : block->cluster->blocks) {
    std::string before;
    for (size_t i = 0; i < b->fibers.size(); ++i) {
      const Fiber& f = *b->fibers[i];
      const char* const waiting = b->waiting[i];
      std::string where = waiting ? std::string("waits in ") + waiting : "can run";
      if (waiting == kReturned) where = "has returned";
      if (waiting == kMemoryBarrier)
        where += " at " + std::to_string(f.barrier) + " for parity " + std::to_string(f.parity);
      if (where != before) std::fprintf(stderr, "  block %u, from thread %zu on: %s\n", b->index, i, where.c_str());
      before = where;
    }
  }
  std::abort();
}

void init_barrier(uint32_t address, int count) {
  shared_bytes(address, 8);
  block->barriers[offset_of(address)] = {.count = count, .missing = count};
}

void expect_at_barrier(uint32_t address, int bytes) { barrier_at(address).missing_bytes += bytes; }
void arrive_at_barrier(uint32_t address, int expected_bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.missing == 0) fail("one arrival too many at the mbarrier at " + std::to_string(offset_of(address)));
  --barrier.missing;
  barrier.missing_bytes += expected_bytes;
  barrier.end_phase_if_complete();
}

void wait_for_barrier(uint32_t address, int parity) {
  if (has_ended(address, parity)) return;
  Fiber& f = *block->running;
  f.barrier = address;
  f.parity = parity;
  suspend(kMemoryBarrier);
  block->waiting[block->thread] = nullptr;
}

int poll(const int* global) {
  Fiber& f = *block->running;
  f.looks = f.polled == global && f.seen == *global ? f.looks + 1 : 0;
  f.polled = global;
  f.seen = *global;
  // The first two looks may be one to know and one to acquire.
  f.in_vain = f.looks >= 2;
  if (f.in_vain)
    suspend(kPolling);
  else
    block->cluster->progress = true;
  return *global;
}

void sleep() {
  block->running->polled = nullptr;
  suspend(kSleeping);
}

int cluster_rank() { return static_cast<int>(block->index % block->cluster->blocks.size()); }
void cluster_barrier() {
  ++block->cluster->at_barrier;
  suspend(kClusterBarrier);
}
void store_later(uint32_t address, const void* bytes, uint32_t barrier) {
  RemoteStore store{address, barrier, {}};
  std::memcpy(store.bytes, bytes, 16);
  block->cluster->stores.push_back(store);
}
void arrive_in_block(uint32_t barrier) {
  Block* const own = block;
  enter_block(*own->cluster->blocks[barrier >> kRankShift]);
  if (block->live == 0) fail("an arrival at a block that has ended");
  arrive_at_barrier(barrier, 0);
  enter_block(*own);
}

void load_box_later(const BoxCopy& copy, uint32_t barrier) { block->loads.push_back({copy, barrier}); }
void store_box_later(const BoxCopy& copy) { block->running->open_stores.push_back(copy); }
void close_store_group() {
  block->running->stores.push_back(std::move(block->running->open_stores));
  block->running->open_stores.clear();
}
void wait_for_stores(int groups_left) {
  auto& groups = block->running->stores;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front())
    for (const BoxCopy& copy : groups.front())
      for_each_chunk(copy, [](const char* shared, char* global) {
        if (global) std::memcpy(global, shared, 16);
      });
}

void defer(std::function<void()> work) {
  block->warps[block->thread / kWarpThreads].open_group.push_back(std::move(work));
}
void close_deferred_group() {
  Warp& warp = block->warps[block->thread / kWarpThreads];
  warp.groups.push_back(std::move(warp.open_group));
  warp.open_group.clear();
}
void wait_for_deferred(int groups_left) {
  auto& groups = block->warps[block->thread / kWarpThreads].groups;
  for (; groups.size() > static_cast<size_t>(groups_left); groups.pop_front())
    for (const auto& work : groups.front()) work();
}

void run_grid(const char* name, int64_t blocks, int threads, size_t shared, int64_t together,
              const std::function<void()>& kernel) {
  together = std::clamp<int64_t>(together, 1, blocks);
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  ++grids[name];
  static std::vector<std::unique_ptr<Fiber>> spare;  // their stacks are kept from grid to grid
  const char* order = std::getenv("FAE_EMULATOR_ORDER");
  const bool backward = order && std::string(order) == "backward";
  const char* slow = std::getenv("FAE_EMULATOR_SLOW");

  Cluster state;
  state.kernel_name = name;
  state.kernel = &kernel;
  state.grid = static_cast<unsigned>(blocks);
  for (int64_t rank = 0; rank < together; ++rank) {
    state.blocks.push_back(std::make_unique<Block>());
    Block& b = *state.blocks.back();
    b.cluster = &state;
    b.warps.resize(threads / kWarpThreads);
    for (int i = 0; i < threads; ++i) {
      b.fibers.push_back(spare.empty() ? std::make_unique<Fiber>() : std::move(spare.back()));
      if (!spare.empty()) spare.pop_back();
    }
  }
  for (int64_t first = 0; first < blocks; first += together) {
    state.blocks.resize(std::min(together, blocks - first));  // the last ones may be fewer
    state.live = threads * static_cast<int>(state.blocks.size());
    for (size_t rank = 0; rank < state.blocks.size(); ++rank) {
      Block& b = *state.blocks[rank];
      b.index = static_cast<unsigned>(first + rank);
      b.shared.assign(shared, static_cast<char>(0xff));
      b.live = threads;
      b.barriers.clear();
      for (int i = 0; i < threads; ++i) prepare_fiber(*b.fibers[i], i);
      b.waiting.assign(threads, nullptr);
    }
    enter_block(*state.blocks[0]);
    run_cluster(state, backward, slow ? std::atoll(slow) : 0);
    if (!state.stores.empty()) fail("a store to another block arrives after its end");
    for (const auto& b : state.blocks) {
      if (!b->loads.empty()) fail("a tensor copy arrives after the block's end");
      for (const Warp& warp : b->warps)
        if (!warp.groups.empty() || !warp.open_group.empty()) fail("a warp leaves products behind");
    }
  }
  for (const auto& b : state.blocks)
    for (auto& f : b->fibers) spare.push_back(std::move(f));
  block = nullptr;
}

// For tests that ask which kernels a call takes.
extern "C" FAE_API int64_t fae_count_grids(const char* name) {
  const auto found = grids.find(name);
  return found == grids.end() ? 0 : found->second;
}

}  // namespace fae::emulator
