#include "module.h"

#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "../cpu/level.h"
#include "../ops/dispatch.h"

// flash_attn_ext._C: what torch's dispatcher does not carry. No op passes through here.

namespace py = pybind11;
using namespace pybind11::literals;

namespace fae::python {
namespace {

std::vector<std::string> names_of(const std::vector<cpu::Level>& levels) {
  std::vector<std::string> names;
  for (const cpu::Level level : levels) names.push_back(cpu::name_of(level));
  return names;
}

py::dict build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
#if defined(FAE_CUDA_VERSION)
  const py::object cuda_version = py::str(FAE_CUDA_VERSION), cuda_architectures = py::str(FAE_CUDA_ARCHITECTURES);
#else
  const py::object cuda_version = py::none(), cuda_architectures = py::none();
#endif
  return py::dict("version"_a = FAE_VERSION, "compiler"_a = compiler, "torch_headers"_a = TORCH_VERSION,
                  "cuda_version"_a = cuda_version, "cuda_architectures"_a = cuda_architectures,
                  "cpu_levels_compiled"_a = names_of(cpu::compiled_levels()),
                  "cpu_levels_available"_a = names_of(cpu::available_levels()),
                  "cpu_level"_a = cpu::name_of(cpu::level()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Facts about this build, the dispatch list, and hooks that let tests reach the code that all kernels share.";
  m.def("build_info", &build_info,
        "Versions, compilers and instruction-set levels of this build, and the level in use.");
  m.def("set_cpu_level", &cpu::set_level, "name"_a,
        "Chooses the CPU kernels by instruction-set level; '' returns to the default. ValueError for another name.");
  m.def("backends", &ops::enabled_backends, "Names of the backends that may be used; empty: all of them.");
  m.def("set_backends", &ops::set_enabled_backends, "names"_a,
        "Limits the dispatch list; empty: all backends. ValueError for a name that no loaded backend has.");
  bind_explain(m);
  py::module_ core = m.def_submodule("core", "Hooks for tests into csrc/core.");
  bind_core(core);
}

}  // namespace fae::python
