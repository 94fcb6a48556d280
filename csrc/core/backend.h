#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "problem.h"

// What a backend folder offers to the dispatch list. Host code only; no torch.

namespace fae {

// Where a kernel runs. The op boundary fills it: on the CPU `run` spreads tasks over torch's threads (tasks start in
// index order, `worker` < threads tells which scratch memory to use); on CUDA `stream` is torch's current stream.
// `workspace` holds at least what the backend's workspace function asked for, 64-byte (CUDA: 256-byte) aligned.
struct Execution {
  using Task = void (*)(void* context, int64_t task, int worker);
  int threads = 1;
  void (*run)(int64_t tasks, Task task, void* context) = nullptr;
  void* stream = nullptr;
  void* workspace = nullptr;

  // run() for any callable f(task, worker).
  template <class F>
  void parallel(int64_t tasks, F&& f) const {
    run(
        tasks, [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// What GPUs read and write at a time.
constexpr int64_t kVectorBytes = 16;

struct Backend {
  const char* name = nullptr;  // "cpu", "sm80", "sm90"
  bool cuda = false;
  // Whether it writes the rows of results that no sequence has, too (unused rows, padding of packed tensors): zeros,
  // and -inf as lse. Otherwise they are there before it runs.
  bool writes_all_rows = false;

  // Whether tensors are to have rows of whole vectors of 16 bytes, and to begin, as all their rows, heads and batches,
  // where those begin. Otherwise they come as they are, with columns side by side.
  bool takes_whole_vectors = false;

  // Why this backend does not take the call, one entry per unmet constraint; empty: it does.
  std::vector<std::string> (*declines)(const Problem&) = nullptr;
  std::vector<std::string> (*declines_backward)(const BackwardProblem&) = nullptr;
  // The kernels it would run, for explain(): name, instruction set and tile sizes.
  std::string (*describe)(const Problem&, bool backward) = nullptr;

  size_t (*forward_workspace)(const Problem&, int threads) = nullptr;
  void (*forward)(const Problem&, const Execution&) = nullptr;
  size_t (*backward_workspace)(const BackwardProblem&, int threads) = nullptr;
  void (*backward)(const BackwardProblem&, const Execution&) = nullptr;
};

}  // namespace fae
