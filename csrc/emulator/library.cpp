#include "../ops/dispatch.h"
#include "../sm80/backend.h"
#include "../sm90/backend.h"

// Loading this library adds the GPU kernels, on the software model, to the backends for CPU tensors. They come after
// the CPU's own: a test names the one it wants.

namespace {

const bool registered = [] {
  fae::ops::register_backend(fae::sm90::backend());
  fae::ops::register_backend(fae::sm80::backend());
  return true;
}();

}  // namespace
