#pragma once

#include <concepts>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace fae::ops {

// Printable facts of a tensor, formatted only where an error needs them.
struct Shape {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};
struct DTypeName {
  ScalarType type;
};
struct DeviceName {
  const Tensor& tensor;
};
inline Shape shape_of(const Tensor& t) { return {t.sizes()}; }
inline DTypeName dtype_name(const Tensor& t) { return {t.scalar_type()}; }

// Strings rather than streams: a process that holds two copies of libstdc++, as one with torch and CUDA's libraries
// can, crashes where a stream of one formats a number with a locale of the other.
inline std::string text_of(const char* text) { return text; }
inline std::string text_of(const std::string& text) { return text; }
inline std::string text_of(std::integral auto number) { return std::to_string(number); }
std::string text_of(double number);
std::string text_of(Shape);
std::string text_of(DTypeName);
std::string text_of(DeviceName);

// Collects the unmet constraints of a call, so that one error names them all.
class Constraints {
 public:
  explicit Constraints(const char* op) : op_(op) {}

  // Notes the message unless `met`; its parts are formatted only then. Returns `met`, for constraints that build on it.
  template <class... Parts>
  bool require(bool met, const Parts&... parts) {
    if (!met) {
      std::string line;
      ((line += text_of(parts)), ...);
      unmet_.push_back(std::move(line));
    }
    return met;
  }

  // std::runtime_error reaches Python as RuntimeError; the package recognises its own by "flash_attn_ext.<op>: ".
  void raise_unmet() const {
    if (unmet_.empty()) return;
    std::string message = std::string("flash_attn_ext.") + op_ + ": " + std::to_string(unmet_.size()) +
                          (unmet_.size() == 1 ? " constraint is not met" : " constraints are not met");
    for (const std::string& line : unmet_) message += "\n- " + line;
    throw std::runtime_error(message);
  }

 private:
  const char* op_;
  std::vector<std::string> unmet_;
};

}  // namespace fae::ops
