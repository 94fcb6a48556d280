// Runs a model that torch.export and AOTInductor have made (torch._inductor.aoti_compile_and_package), without Python:
//   run_exported MODEL.pt2 DEVICE SHAPE...
// on float32 numbers -1 to 1 of that shape, on the device that it was compiled for, "cpu" or "cuda", and prints the sum
// of its first result.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 DEVICE SHAPE...\n", arguments[0]);
    return 2;
  }
  std::vector<int64_t> shape;
  int64_t numel = 1;
  for (int i = 3; i < count; ++i) {
    shape.push_back(std::atoll(arguments[i]));
    numel *= shape.back();
  }
  const at::Tensor x = at::linspace(-1, 1, numel, at::kFloat).view(shape).to(at::Device(arguments[2]));
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  std::printf("%.9g\n", model.run({x}).at(0).to(at::kDouble).sum().item<double>());
}
