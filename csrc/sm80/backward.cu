#include "kernels.h"
namespace fae::sm80 {
template <> size_t backward_workspace<FAE_HEAD_DIM>(const BackwardProblem&) { return 0; }
template <> void backward<FAE_HEAD_DIM>(const BackwardProblem&, const Execution&) {}
}
