// Weight matrices in the memory of their checkpoint.
#include <cstdint>
#include <string>
#include <utility>

#include "base/check.h"
#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "formats/scale_grid.h"

namespace py = pybind11;

namespace cpumoe {

void BindMatrix(py::module_& m) {
  py::enum_<ScaleType>(m, "ScaleType")
      .value("OWN", ScaleType::kOwn)
      .value("E8M0", ScaleType::kE8M0)
      .value("BF16", ScaleType::kBf16)
      .value("FP32", ScaleType::kFp32)
      .value("E4M3", ScaleType::kE4M3)
      .value("FP16", ScaleType::kFp16);

  py::class_<ScaleGrid>(m, "ScaleGrid")
      .def_readonly("rows", &ScaleGrid::rows)
      .def_readonly("depth", &ScaleGrid::depth)
      .def_readonly("type", &ScaleGrid::type);

  py::class_<StoredScales>(m, "StoredScales")
      .def_readonly("grid", &StoredScales::grid)
      .def_readonly("factor", &StoredScales::factor);

  py::class_<MatrixArgs>(m, "Matrix")
      .def(
          py::init([](std::string name, int64_t rows, int64_t columns, uintptr_t codes,
                      int64_t codes_stride, uintptr_t scales, int64_t scales_stride,
                      int64_t scale_rows, int64_t scale_depth, ScaleType scale_type, float factor) {
            RequireCount(rows, name, " rows");
            RequireCount(columns, name, " columns");
            if (rows > 0 && columns > 0) {
              RequireAddress(AsPointer(codes), name, " codes");
            }
            Require(scale_depth > 0, name, ": scale_depth must be positive, got ", scale_depth);
            Require(scale_rows > 0, name, ": scale_rows must be positive, got ", scale_rows);
            return MatrixArgs{
                std::move(name), rows,   columns,       codes,
                codes_stride,    scales, scales_stride, {scale_rows, scale_depth, scale_type},
                factor};
          }),
          py::kw_only(), py::arg("name"), py::arg("rows"), py::arg("columns"), py::arg("codes"),
          py::arg("codes_stride"), py::arg("scales") = 0, py::arg("scales_stride") = 0,
          py::arg("scale_rows") = 1, py::arg("scale_depth") = kGroupSize,
          py::arg("scale_type") = ScaleType::kOwn, py::arg("factor") = 1.0f);
}

}  // namespace cpumoe
