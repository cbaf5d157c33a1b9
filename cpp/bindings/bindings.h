// The parts of the extension module, with one function for each concept.
#pragma once

#include <pybind11/pybind11.h>

namespace cpumoe {

void BindAttention(pybind11::module_& m);
void BindIsa(pybind11::module_& m);
void BindRuntime(pybind11::module_& m);
void BindMatrix(pybind11::module_& m);
void BindLayer(pybind11::module_& m);
void BindCall(pybind11::module_& m);
void BindLinear(pybind11::module_& m);
void BindPlain(pybind11::module_& m);
void BindStream(pybind11::module_& m);
void BindWeightedSums(pybind11::module_& m);
void BindLimits(pybind11::module_& m);

}  // namespace cpumoe
