#include "execution.h"

#include <algorithm>
#include <atomic>

// Weak, because a torch without CUDA does not have it; the CUDA key is never called there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fae::ops {
namespace {

constexpr size_t kAlignment = 256;  // of workspaces

// Threads draw tasks in index order from one counter. torch may give a thread the range of several workers, down to
// one thread for all of them (nested parallelism): the thread then works under the first worker's number, and the
// others' numbers go unused.
void run_on_threads(int64_t tasks, Execution::Task task, void* context) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      task(context, i, static_cast<int>(worker));
  });
}

}  // namespace

Runner::Runner(const Tensor& on) : on_(on) {
  if (!on.is_cuda()) {
    execution_.threads = static_cast<int>(torch::stable::get_num_threads());
    execution_.run = run_on_threads;
    return;
  }
  const int32_t device = on.get_device_index();
  guard_.emplace(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &execution_.stream));
}

const Execution& Runner::execution(size_t workspace_bytes) {
  if (workspace_bytes > 0) {
    workspace_ = new_empty(on_, {static_cast<int64_t>(workspace_bytes + kAlignment)}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(workspace_->data_ptr());
    execution_.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  return execution_;
}

}  // namespace fae::ops
