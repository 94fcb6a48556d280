#pragma once

#include "../core/backend.h"

// Rows of results that attention kernels do not come to: unused ones, padding of packed tensors. They are few, or none,
// so that a look at every row costs less than to fill whole tensors beforehand.

namespace fae::cuda {

// out = 0 and lse = -inf where no sequence has the row.
void clear_other_rows(const Problem& p, const Execution& execution);

// dq, dk and dv = 0 there, and dq also in rows that see no key.
void clear_other_gradients(const BackwardProblem& p, const Execution& execution);

}  // namespace fae::cuda
