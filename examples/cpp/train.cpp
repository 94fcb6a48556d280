// Trains a language model of bytes on a text file, with attention by flash_attn_ext and everything else by LibTorch:
//   train FILE [STEPS [DEVICE]]
// in float64 on the CPU, in float32 on "cuda", and prints the loss of every step. tests/test_cpp.py trains the same
// model in Python and compares.

#include <flash_attn_ext/flash_attn_ext.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

using torch::Tensor;

constexpr int64_t kBytes = 256, kWidth = 32, kHeads = 4, kHeadsKv = 2, kContext = 64, kBatch = 8;
constexpr int64_t kHeadDim = kWidth / kHeads, kWindow = 24;

// Embedding, one layer of causal attention in a sliding window, with sinks, and a head that predicts the next byte.
struct Model : torch::nn::Module {
  Tensor embedding, position, query, key, value, output, sinks, head;

  explicit Model(torch::Device device) {
    const auto dtype = device.is_cuda() ? torch::kFloat : torch::kDouble;
    const auto weight = [&](const char* name, std::vector<int64_t> shape, double scale) {
      // Drawn on the CPU: the same numbers on every device.
      return register_parameter(name, (scale * torch::randn(shape, torch::kDouble)).to(device, dtype));
    };
    embedding = weight("embedding", {kBytes, kWidth}, 0.5);
    position = weight("position", {kContext, kWidth}, 0.1);
    query = weight("query", {kWidth, kHeads * kHeadDim}, 0.2);
    key = weight("key", {kWidth, kHeadsKv * kHeadDim}, 0.2);
    value = weight("value", {kWidth, kHeadsKv * kHeadDim}, 0.2);
    output = weight("output", {kHeads * kHeadDim, kWidth}, 0.2);
    sinks = weight("sinks", {kHeads}, 0.1);
    head = weight("head", {kWidth, kBytes}, 0.2);
  }

  // bytes (batch, kContext), int64 -> logits (batch, kContext, kBytes)
  Tensor forward(const Tensor& bytes) {
    const Tensor x = embedding.index_select(0, bytes.flatten()).unflatten(0, bytes.sizes()) + position;
    flash_attn_ext::AttentionOptions options;
    options.causal = true;
    options.window_size = {kWindow, -1};
    options.sinks = sinks;
    const Tensor q = x.matmul(query).unflatten(-1, {kHeads, kHeadDim});
    const Tensor k = x.matmul(key).unflatten(-1, {kHeadsKv, kHeadDim});
    const Tensor v = x.matmul(value).unflatten(-1, {kHeadsKv, kHeadDim});
    const auto [attended, lse] = flash_attn_ext::attention(q, k, v, options);
    return (x + attended.flatten(2).matmul(output)).matmul(head);
  }
};

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s FILE [STEPS [DEVICE]]\n", arguments[0]);
    return 2;
  }
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  if (static_cast<int64_t>(text.size()) <= kContext) {
    std::fprintf(stderr, "%s: needs more than %d bytes, has %zu\n", arguments[1], int(kContext), text.size());
    return 2;
  }
  const int steps = count > 2 ? std::atoi(arguments[2]) : 200;
  const torch::Device device(count > 3 ? arguments[3] : "cpu");
  const Tensor bytes =
      torch::from_blob(const_cast<char*>(text.data()), {int64_t(text.size())}, torch::kByte).to(torch::kLong);

  torch::manual_seed(0);
  Model model(device);
  torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(1e-2));
  const Tensor offsets = torch::arange(kContext + 1);
  for (int step = 0; step < steps; ++step) {
    const Tensor starts = torch::randint(bytes.size(0) - kContext, {kBatch, 1});
    const Tensor places = (starts + offsets).flatten();
    const Tensor rows = bytes.index_select(0, places).view({kBatch, kContext + 1}).to(device);
    const Tensor logits = model.forward(rows.slice(1, 0, kContext));
    const Tensor loss = torch::cross_entropy_loss(logits.flatten(0, 1), rows.slice(1, 1).flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    std::printf("step %d loss %.15g\n", step, loss.item<double>());
  }
}
