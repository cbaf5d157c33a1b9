// Sums of results. Python passes addresses that it has checked.
#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "engine/runtime.h"
#include "engine/weighted_sums.h"

namespace py = pybind11;

namespace cpumoe {

void BindWeightedSums(py::module_& m) {
  py::class_<WeightedSums>(m, "WeightedSums")
      .def(py::init<const std::string&, const std::string&>(), py::kw_only(), py::arg("isa"),
           py::arg("origin"))
      // Keywords cost time, so these arguments may also be positional.
      .def(
          "run",
          [](const WeightedSums& self, Runtime& runtime, DType output_dtype, int64_t tokens,
             int64_t columns, uintptr_t terms, int64_t num_rows, uintptr_t begins, uintptr_t rows,
             uintptr_t weights, uintptr_t output) {
            self.Execute(runtime, {.output_dtype = output_dtype,
                                   .tokens = tokens,
                                   .columns = columns,
                                   .terms = static_cast<const float*>(AsPointer(terms)),
                                   .num_rows = num_rows,
                                   .begins = static_cast<const int64_t*>(AsPointer(begins)),
                                   .rows = static_cast<const int64_t*>(AsPointer(rows)),
                                   .weights = static_cast<const float*>(AsPointer(weights)),
                                   .output = reinterpret_cast<void*>(output)});
          },
          py::arg("runtime"), py::arg("output_dtype"), py::arg("tokens"), py::arg("columns"),
          py::arg("terms"), py::arg("num_rows"), py::arg("begins"), py::arg("rows"),
          py::arg("weights"), py::arg("output"), py::call_guard<py::gil_scoped_release>(),
          "output[t] = sum of weights[i] * terms[rows[i]] for i in [begins[t], begins[t + 1]), "
          "with the roundings of a layer's calls.");
}

}  // namespace cpumoe
