#pragma once

#include <pybind11/pybind11.h>

namespace fae::python {

void bind_explain(pybind11::module_& m);
void bind_core(pybind11::module_& m);

}  // namespace fae::python
