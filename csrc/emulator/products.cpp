#include "block.h"

// The arithmetic of tensor cores, in a file of its own: it is compiled for speed, which the kernels are not.

namespace fae::emulator {
namespace {

template <int kCols>
void add_to_columns(int rows, int cols, int depth, const float* a, const float* b, float* sum) {
  for (int i = 0; i < rows; ++i) {
    float x[kCols];
    for (int j = 0; j < kCols; ++j) x[j] = sum[i * cols + j];
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < kCols; ++j) x[j] += a[i * depth + k] * b[k * cols + j];
    for (int j = 0; j < kCols; ++j) sum[i * cols + j] = x[j];
  }
}

}  // namespace

void add_product(int rows, int cols, int depth, const float* a, const float* b, float* sum) {
  for (int first = 0; first < cols; first += 8) add_to_columns<8>(rows, cols, depth, a, b + first, sum + first);
}

}  // namespace fae::emulator
