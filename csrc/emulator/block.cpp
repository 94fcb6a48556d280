#include "block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

namespace fae::emulator {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

struct Copy {
  uint32_t shared_offset;
  const void* global;
  int bytes, valid;
};

struct Fiber {
  ucontext_t start;  // used once, to enter the stack; after that jump buffers switch without a system call
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const char* waiting = nullptr;  // the operation it waits in; null: runnable
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  LaneOperands operands[kWarpThreads];
};

struct Block {
  const char* kernel_name;
  const std::function<void()>* kernel;
  unsigned index = 0, grid = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  int at_barrier = 0, live = 0;

  Fiber* running = nullptr;
  unsigned running_index = 0;
  jmp_buf scheduler;
};

Block* block = nullptr;
const char* const kBarrier = "__syncthreads";

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: kernel %s, block %u, thread %u: %s\n", block->kernel_name, block->index,
               block->running_index, what.c_str());
  for (size_t i = 0; i < block->fibers.size(); i += 1) {
    const Fiber& f = *block->fibers[i];
    if (!f.done && f.waiting) std::fprintf(stderr, "  thread %zu waits in %s\n", i, f.waiting);
  }
  std::abort();
}

void suspend() {
  if (_setjmp(block->running->resume) == 0) _longjmp(block->scheduler, 1);
}

void enter_fiber() {
  (*block->kernel)();
  block->running->done = true;
  --block->live;
  _longjmp(block->scheduler, 1);
}

void resume(unsigned index) {
  Fiber& f = *block->fibers[index];
  block->running = &f;
  block->running_index = index;
  if (_setjmp(block->scheduler) != 0) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}

void prepare_fiber(Fiber& f) {
  if (!f.stack) f.stack.reset(new char[kStackBytes]);
  f.started = f.done = false;
  f.waiting = nullptr;
  f.open_group.clear();
  f.groups.clear();
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStackBytes;
  f.start.uc_link = nullptr;
  makecontext(&f.start, enter_fiber, 0);
}

// Lets every thread run as far as it gets, a warp at a time, until all have returned.
void run_block(bool backward) {
  const auto warps = static_cast<unsigned>(block->warps.size());
  while (block->live > 0) {
    bool progress = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = backward ? warps - 1 - i : i;
      for (bool moved = true; moved;) {
        moved = false;
        for (unsigned lane = 0; lane < kWarpThreads; ++lane) {
          const unsigned index = warp * kWarpThreads + lane;
          const Fiber& f = *block->fibers[index];
          if (f.done || f.waiting) continue;
          resume(index);
          moved = progress = true;
        }
      }
    }
    if (block->at_barrier > 0 && block->at_barrier == block->live) {
      block->at_barrier = 0;
      for (const auto& f : block->fibers)
        if (f->waiting == kBarrier) f->waiting = nullptr;
      progress = true;
    }
    if (!progress) fail("no thread can go on");
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

Index thread_index() { return {block->running_index}; }
Index block_index() { return {block->index}; }
Index grid_size() { return {block->grid}; }
char* shared_memory() { return block->shared.data(); }

void warp_operation(const char* name, WarpOperation operation, const void* in, void* out) {
  const unsigned index = block->running_index, first = index / kWarpThreads * kWarpThreads;
  Warp& warp = block->warps[index / kWarpThreads];
  warp.operands[index % kWarpThreads] = {in, out};
  block->running->waiting = name;
  if (++warp.arrived < kWarpThreads) return suspend();
  warp.arrived = 0;
  for (unsigned i = first; i < first + kWarpThreads; ++i) {
    if (block->fibers[i]->waiting != std::string_view(name))
      fail(std::string("the lanes of a warp are not all in ") + name);
    block->fibers[i]->waiting = nullptr;
  }
  operation(warp.operands);
}

void block_barrier() {
  block->running->waiting = kBarrier;
  ++block->at_barrier;
  suspend();
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

char* shared_bytes(uint32_t offset, int bytes) {
  if (offset + static_cast<size_t>(bytes) > block->shared.size() || offset % bytes != 0)
    fail("shared memory at " + std::to_string(offset) + " of " + std::to_string(block->shared.size()));
  return block->shared.data() + offset;
}

void run_grid(const char* name, int64_t blocks, int threads, size_t shared, const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static std::vector<std::unique_ptr<Fiber>> stacks;  // kept from grid to grid
  const char* order = std::getenv("FAE_EMULATOR_ORDER");
  const bool backward = order && std::string(order) == "backward";

  Block state;
  state.kernel_name = name;
  state.kernel = &kernel;
  state.grid = static_cast<unsigned>(blocks);
  state.fibers = std::move(stacks);
  while (state.fibers.size() < static_cast<size_t>(threads)) state.fibers.push_back(std::make_unique<Fiber>());
  std::vector<std::unique_ptr<Fiber>> spare;
  while (state.fibers.size() > static_cast<size_t>(threads)) {
    spare.push_back(std::move(state.fibers.back()));
    state.fibers.pop_back();
  }
  state.warps.resize(threads / kWarpThreads);
  block = &state;
  for (int64_t i = 0; i < blocks; ++i) {
    state.index = static_cast<unsigned>(i);
    state.shared.assign(shared, static_cast<char>(0xff));
    state.live = threads;
    for (const auto& f : state.fibers) prepare_fiber(*f);
    run_block(backward);
  }
  stacks = std::move(state.fibers);
  for (auto& f : spare) stacks.push_back(std::move(f));
  block = nullptr;
}

}  // namespace fae::emulator
