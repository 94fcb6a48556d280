#include "ptx_sm80.h"

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

namespace fae::sm80 {

template <class T>
void multiply_fragments(const LaneOperands (&lanes)[32]) {
  constexpr int kPerWord = 4 / sizeof(T), kHalf = 4 * kPerWord;  // columns of A in its first two registers
  float a[16][2 * kHalf], b[2 * kHalf][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MmaOperands<T>*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kPerWord; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t * kPerWord + e + i / 2 * kHalf] = element<T>((*in.a)[i], e);
      for (int i = 0; i < 2; ++i) b[t * kPerWord + e + i * kHalf][g] = element<T>((*in.b)[i], e);
    }
  }
  float sum[16][8] = {};
  emulator::add_product(16, 8, 2 * kHalf, a[0], b[0], sum[0]);
  for (int lane = 0; lane < 32; ++lane) {
    float (&d)[4] = *static_cast<const MmaOperands<T>*>(lanes[lane].in)->d;
    for (int i = 0; i < 4; ++i) d[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template void multiply_fragments<float>(const LaneOperands (&)[32]);
template void multiply_fragments<__nv_bfloat16>(const LaneOperands (&)[32]);
template void multiply_fragments<__half>(const LaneOperands (&)[32]);

}  // namespace fae::sm80
