// A dense matrix and its calls. Python passes addresses that it has checked.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "engine/linear_layer.h"
#include "engine/runtime.h"

namespace py = pybind11;

namespace cpumoe {

void BindLinear(py::module_& m) {
  // Python has no const objects. Nothing of a layer changes once it is made.
  using Layer = std::shared_ptr<LinearLayer>;

  py::class_<LinearLayer, Layer>(m, "LinearLayer")
      .def(py::init([](Runtime& runtime, const std::string& isa, const std::string& origin,
                       const std::string& format, const MatrixArgs& matrix, uintptr_t bias,
                       Precision precision, bool batch_invariant, int few_token_limit) {
             const KernelOptions kernels = {.precision = precision,
                                            .batch_invariant = batch_invariant,
                                            .few_token_limit = few_token_limit};
             return std::const_pointer_cast<LinearLayer>(
                 LinearLayer::Create(runtime, isa, origin, format, matrix.View<const std::byte>(),
                                     static_cast<const float*>(AsPointer(bias)), kernels));
           }),
           py::kw_only(), py::arg("runtime"), py::arg("isa"), py::arg("origin"), py::arg("format"),
           py::arg("matrix"), py::arg("bias"), py::arg("precision"), py::arg("batch_invariant"),
           py::arg("few_token_limit"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &LinearLayer::nbytes,
                             "The bytes of the packed weights, the bias included.")
      .def_property_readonly("scales", &LinearLayer::scales,
                             "How many rows and successive k of the stored matrix share a scale, "
                             "the scales' type, and the matrix's factor.")
      .def("placement", &LinearLayer::placement, py::call_guard<py::gil_scoped_release>(),
           "Where the packed weights lie, a share for each node of the runtime.")
      .def(
          "unpack",
          [](const LinearLayer& self, Runtime& runtime, const MatrixArgs& matrix) {
            self.Unpack(runtime, matrix.View<std::byte>());
          },
          py::kw_only(), py::arg("runtime"), py::arg("matrix"),
          py::call_guard<py::gil_scoped_release>(),
          "Writes the matrix as its checkpoint stores it.");

  py::class_<LinearCall>(m, "LinearCall")
      .def(py::init([](std::shared_ptr<Runtime> runtime, Layer layer, DType input_dtype,
                       DType output_dtype, bool fp32_as_bf16) {
             return std::make_unique<LinearCall>(std::move(runtime), std::move(layer),
                                                 LinearCall::Options{.input_dtype = input_dtype,
                                                                     .output_dtype = output_dtype,
                                                                     .fp32_as_bf16 = fp32_as_bf16});
           }),
           py::kw_only(), py::arg("runtime"), py::arg("layer"), py::arg("input_dtype"),
           py::arg("output_dtype"), py::arg("fp32_as_bf16"))
      // Keywords cost time, so these arguments may also be positional.
      .def(
          "run",
          [](const LinearCall& self, uintptr_t x, int64_t x_stride, int64_t tokens,
             uintptr_t output, int64_t output_stride) {
            self.Execute(AsPointer(x), x_stride, tokens, reinterpret_cast<void*>(output),
                         output_stride);
          },
          py::arg("x"), py::arg("x_stride"), py::arg("tokens"), py::arg("output"),
          py::arg("output_stride"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace cpumoe
