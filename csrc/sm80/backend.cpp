#include "backend.h"

#include <algorithm>
#include <cstdint>

#include "../cuda/other_rows.h"
#include "kernels.h"

namespace fae::sm80 {
namespace {

// Calls run with the smallest head dim tile that holds a call's head dims, as a constant.
template <class F>
auto with_head_dim(const Problem& p, F&& run) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 64) return run(std::integral_constant<int, 64>{});
  if (dim <= 128) return run(std::integral_constant<int, 128>{});
  if (dim <= 192) return run(std::integral_constant<int, 192>{});
  if (dim <= 256) return run(std::integral_constant<int, 256>{});
  return run(std::integral_constant<int, 512>{});
}

std::vector<std::string> declines(const Problem& p) {
  std::vector<std::string> reasons;
  if (p.dtype == DType::float64) reasons.push_back("it takes float32, bfloat16 and float16, not float64");
  if (std::max(p.head_dim, p.head_dim_v) > 512) reasons.push_back("it takes head dims up to 512");
  return reasons;
}

std::vector<std::string> declines_backward(const BackwardProblem& p) { return declines(p); }

std::string describe(const Problem& p, bool backward) {
  const auto tile = with_head_dim(p, [](auto dim) { return std::to_string(dim()); });
  return std::string(backward ? "backward" : "forward") + " on mma.sync, head dim tile " + tile;
}

size_t forward_workspace(const Problem&, int) { return 0; }

void forward(const Problem& p, const Execution& execution) {
  cuda::clear_other_rows(p, execution);
  with_head_dim(p, [&](auto dim) { sm80::forward<dim()>(p, execution); });
}

size_t backward_workspace(const BackwardProblem& p, int) {
  return with_head_dim(p, [&](auto dim) { return sm80::backward_workspace<dim()>(p); });
}

void backward(const BackwardProblem& p, const Execution& execution) {
  cuda::clear_other_gradients(p, execution);
  with_head_dim(p, [&](auto dim) { sm80::backward<dim()>(p, execution); });
}

}  // namespace

const Backend& backend() {
#if defined(FAE_EMULATOR)
  constexpr const char* kName = "sm80_emulated";
  constexpr bool kCuda = false;
#else
  constexpr const char* kName = "sm80";
  constexpr bool kCuda = true;
#endif
  static const Backend sm80{.name = kName,
                            .cuda = kCuda,
                            .writes_all_rows = true,
                            .takes_whole_vectors = true,
                            .declines = declines,
                            .declines_backward = declines_backward,
                            .describe = describe,
                            .forward_workspace = forward_workspace,
                            .forward = forward,
                            .backward_workspace = backward_workspace,
                            .backward = backward};
  return sm80;
}

}  // namespace fae::sm80
