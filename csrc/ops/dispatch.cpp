#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "../cpu/backend.h"

namespace fae::ops {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<const Backend*> backends{&cpu::backend()};
  std::optional<std::vector<std::string>> enabled;  // absent until FAE_BACKENDS has been read
  RowwiseKernels cuda_rowwise;
};

Registry& registry() {
  static Registry r;
  return r;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

void require_known(const Registry& r, const std::vector<std::string>& names, const char* source) {
  std::vector<std::string> known;
  for (const Backend* b : r.backends) known.push_back(b->name);
  for (const std::string& name : names)
    if (std::find(known.begin(), known.end(), name) == known.end())
      throw std::invalid_argument(std::string(source) + " must name backends that are loaded (" + joined(known) +
                                  "), got '" + name + "'");
}

// Read at the first call rather than at load time: the CUDA library's backends have joined the list by then.
const std::vector<std::string>& enabled(Registry& r) {
  if (!r.enabled) {
    std::vector<std::string> names;
    const char* value = std::getenv("FAE_BACKENDS");
    for (std::string_view rest = value ? value : ""; !rest.empty();) {
      const size_t comma = std::min(rest.find(','), rest.size());
      if (comma > 0) names.emplace_back(rest.substr(0, comma));
      rest.remove_prefix(std::min(comma + 1, rest.size()));
    }
    require_known(r, names, "FAE_BACKENDS");
    r.enabled = std::move(names);
  }
  return *r.enabled;
}

bool is_enabled(Registry& r, const Backend& b) {
  const auto& names = enabled(r);
  return names.empty() || std::find(names.begin(), names.end(), b.name) != names.end();
}

std::vector<std::string> declines(const Backend& b, const Problem& p) { return b.declines(p); }
std::vector<std::string> declines(const Backend& b, const BackwardProblem& p) { return b.declines_backward(p); }

template <class P>
std::vector<std::string> reasons_against(Registry& r, const Backend& b, const P& p, bool cuda) {
  std::vector<std::string> reasons;
  if (b.cuda != cuda)
    reasons.push_back(std::string("it runs on ") + (b.cuda ? "CUDA" : "CPU") + " tensors, the tensors are on " +
                      (cuda ? "CUDA" : "the CPU"));
  if (!is_enabled(r, b)) reasons.push_back("it is not among the enabled backends (" + joined(enabled(r)) + ")");
  // A backend looks only at problems of its own device.
  if (b.cuda == cuda)
    for (std::string& reason : declines(b, p)) reasons.push_back(std::move(reason));
  return reasons;
}

template <class P>
std::vector<Candidate> all_candidates(const P& p, bool cuda) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  std::vector<Candidate> all;
  for (const Backend* b : r.backends) all.push_back({b, reasons_against(r, *b, p, cuda)});
  return all;
}

template <class P>
const Backend& choose(const P& p, bool cuda, const char* op) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  std::string lines;
  for (const Backend* b : r.backends) {
    const auto reasons = reasons_against(r, *b, p, cuda);
    if (reasons.empty()) return *b;
    for (const std::string& reason : reasons) lines += std::string("\n- ") + b->name + ": " + reason;
  }
  throw std::runtime_error(std::string("flash_attn_ext.") + op + ": no backend takes this call" + lines);
}

}  // namespace

void register_backend(const Backend& backend) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  r.backends.push_back(&backend);
}

void register_cuda_rowwise(const RowwiseKernels& kernels) { registry().cuda_rowwise = kernels; }

std::vector<std::string> enabled_backends() {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  return enabled(r);
}

void set_enabled_backends(const std::vector<std::string>& names) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  require_known(r, names, "the enabled backends");
  r.enabled = names;
}

std::vector<Candidate> candidates(const Problem& p, bool cuda) { return all_candidates(p, cuda); }
std::vector<Candidate> candidates(const BackwardProblem& p, bool cuda) { return all_candidates(p, cuda); }

const Backend& choose_backend(const Problem& p, bool cuda) { return choose(p, cuda, "forward"); }
const Backend& choose_backend(const BackwardProblem& p, bool cuda) { return choose(p, cuda, "backward"); }

bool takes_whole_vectors(bool cuda) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  const auto first = std::find_if(r.backends.begin(), r.backends.end(),
                                  [&](const Backend* b) { return b->cuda == cuda && is_enabled(r, *b); });
  return first != r.backends.end() && (*first)->takes_whole_vectors;
}

const RowwiseKernels& rowwise_kernels(bool cuda) { return cuda ? registry().cuda_rowwise : cpu::kernels().rowwise; }

}  // namespace fae::ops
