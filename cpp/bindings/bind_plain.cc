// Operations on plain tensors, without packed weights. Python passes addresses that it has checked.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "engine/rms_norm.h"
#include "engine/row_product.h"

namespace py = pybind11;

namespace cpumoe {

void BindPlain(py::module_& m) {
  // Keywords cost time, so arguments may also be positional.
  m.def(
      "rms_norm",
      [](Runtime& runtime, DType dtype, int64_t rows, int64_t columns, uintptr_t x, uintptr_t y,
         DType weight_dtype, uintptr_t weight, bool one_plus, double eps) {
        // Other Python threads would hardly get a turn in the time of few rows.
        std::optional<py::gil_scoped_release> release;
        if (IsLongRmsNorm(rows, columns)) release.emplace();
        RmsNorm(runtime, {.dtype = dtype,
                          .rows = rows,
                          .columns = columns,
                          .x = AsPointer(x),
                          .y = reinterpret_cast<void*>(y),
                          .weight_dtype = weight_dtype,
                          .weight = AsPointer(weight),
                          .one_plus = one_plus,
                          .eps = eps});
      },
      py::arg("runtime"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("x"),
      py::arg("y"), py::arg("weight_dtype"), py::arg("weight"), py::arg("one_plus"), py::arg("eps"),
      "x, y: [rows, columns]. weight: [columns], or 0 if there is none.");
  m.def(
      "row_product",
      [](Runtime& runtime, DType dtype, int64_t tokens, int64_t rows, int64_t columns, uintptr_t x,
         uintptr_t w, uintptr_t y) {
        RowProduct(runtime, {.dtype = dtype,
                             .tokens = tokens,
                             .rows = rows,
                             .columns = columns,
                             .x = AsPointer(x),
                             .w = AsPointer(w),
                             .y = reinterpret_cast<void*>(y)});
      },
      py::arg("runtime"), py::arg("dtype"), py::arg("tokens"), py::arg("rows"), py::arg("columns"),
      py::arg("x"), py::arg("w"), py::arg("y"), py::call_guard<py::gil_scoped_release>(),
      "x: [tokens, columns], w: [rows, columns], y: [tokens, rows].");
}

}  // namespace cpumoe
