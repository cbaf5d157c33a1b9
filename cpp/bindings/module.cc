// cpumoe._core, which the Python package calls. Tensors arrive as addresses that Python has
// checked.
#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Bindings of cpumoe's C++ engine; use the cpumoe package instead.";
  cpumoe::BindIsa(m);
  cpumoe::BindRuntime(m);
  cpumoe::BindMatrix(m);
  cpumoe::BindLayer(m);
  cpumoe::BindCall(m);
  cpumoe::BindLinear(m);
  cpumoe::BindAttention(m);
  cpumoe::BindPlain(m);
  cpumoe::BindWeightedSums(m);
  cpumoe::BindStream(m);
  cpumoe::BindLimits(m);
}
