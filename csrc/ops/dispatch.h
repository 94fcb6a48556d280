#pragma once

#include <string>
#include <vector>

#include "../core/rowwise.h"

// Which backend takes a call: the first in the list that runs on the tensors' device, is enabled and has no reason to
// decline. No torch here, so that the Python module can ask the same questions.

namespace fae::ops {

// The CPU's is there from the start; the CUDA library adds its own when it is loaded. `backend` must live on.
FAE_API void register_backend(const Backend& backend);
FAE_API void register_cuda_rowwise(const RowwiseKernels& kernels);

// Names of the backends that may be used, from FAE_BACKENDS or the last call of the setter; empty: all of them.
// The setter throws std::invalid_argument for a name that no backend has.
FAE_API std::vector<std::string> enabled_backends();
FAE_API void set_enabled_backends(const std::vector<std::string>& names);

struct Candidate {
  const Backend* backend;
  std::vector<std::string> reasons;  // why it does not take the call; empty: it does
};

// Every backend, in dispatch order, and what it says to the call or to its backward.
FAE_API std::vector<Candidate> candidates(const Problem& p, bool cuda);
FAE_API std::vector<Candidate> candidates(const BackwardProblem& p, bool cuda);

// Throws std::runtime_error with all reasons of all backends where none takes the call. The current device is that of
// the tensors.
const Backend& choose_backend(const Problem& p, bool cuda);
const Backend& choose_backend(const BackwardProblem& p, bool cuda);

// Whether a call goes to backends that take whole vectors only: of one device, all do, or none.
FAE_API bool takes_whole_vectors(bool cuda);

// Kernels of softmax and merge on the CPU or the CUDA devices.
const RowwiseKernels& rowwise_kernels(bool cuda);

}  // namespace fae::ops
