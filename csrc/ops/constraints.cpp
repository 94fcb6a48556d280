#include "constraints.h"

#include <cctype>
#include <cstdio>

namespace fae::ops {

std::string text_of(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", number);
  return text;
}

std::string text_of(Shape shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(shape.sizes[i]);
  return text + (shape.sizes.size() == 1 ? ",)" : ")");
}

std::string text_of(DTypeName name) {
  switch (name.type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {
      std::string text = torch::headeronly::toString(name.type);  // torch's name but for a capital, as in Float8_e5m2
      for (char& letter : text) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
      return text;
    }
  }
}

std::string text_of(DeviceName name) {
  if (name.tensor.is_cpu()) return "cpu";
  return name.tensor.is_cuda() ? "cuda:" + std::to_string(name.tensor.get_device_index()) : "meta";
}

}  // namespace fae::ops
