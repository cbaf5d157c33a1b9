// Forward calls. Python passes addresses that it has checked, each by the name of its argument.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/call_tensors.h"
#include "bindings/submitted_call.h"
#include "engine/call.h"
#include "engine/layer.h"
#include "engine/pending_call.h"
#include "engine/runtime.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

void Run(const Call& self, uintptr_t hidden_states, int64_t hidden_stride, int64_t tokens,
         uintptr_t ids, uintptr_t weights, uintptr_t output) {
  self.Execute(TensorsAt(hidden_states, hidden_stride, tokens, ids, weights, output));
}

std::unique_ptr<SubmittedCall> Submit(const Call& self, uintptr_t hidden_states,
                                      int64_t hidden_stride, int64_t tokens, uintptr_t ids,
                                      uintptr_t weights, uintptr_t output, py::object owned,
                                      bool copy_inputs) {
  auto call = std::make_unique<SubmittedCall>(std::move(owned));
  const py::gil_scoped_release release;
  call->Start(PendingCall(self.Submit(
      TensorsAt(hidden_states, hidden_stride, tokens, ids, weights, output), copy_inputs)));
  return call;
}

}  // namespace

void BindCall(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("BF16", DType::kBf16)
      .value("FP16", DType::kFp16)
      .value("FP32", DType::kFp32);

  py::class_<Call>(m, "Call")
      .def(py::init([](std::shared_ptr<Runtime> runtime, std::shared_ptr<Layer> layer,
                       DType input_dtype, DType output_dtype, bool accumulate, bool fp32_as_bf16,
                       int64_t top_k, bool ids_are_64_bit) {
             return std::make_unique<Call>(std::move(runtime), std::move(layer),
                                           Call::Options{.input_dtype = input_dtype,
                                                         .output_dtype = output_dtype,
                                                         .accumulate = accumulate,
                                                         .fp32_as_bf16 = fp32_as_bf16,
                                                         .top_k = top_k,
                                                         .ids_are_64_bit = ids_are_64_bit});
           }),
           py::kw_only(), py::arg("runtime"), py::arg("layer"), py::arg("input_dtype"),
           py::arg("output_dtype"), py::arg("accumulate") = false, py::arg("fp32_as_bf16") = false,
           py::arg("top_k"), py::arg("ids_are_64_bit"))
      // Six keywords cost half a microsecond, so these arguments may also be positional.
      .def("run", &Run, py::arg("hidden_states"), py::arg("hidden_stride"), py::arg("tokens"),
           py::arg("ids"), py::arg("weights"), py::arg("output"),
           py::call_guard<py::gil_scoped_release>())
      .def("submit", &Submit, py::arg("hidden_states"), py::arg("hidden_stride"), py::arg("tokens"),
           py::arg("ids"), py::arg("weights"), py::arg("output"), py::kw_only(), py::arg("owned"),
           py::arg("copy_inputs") = false);
}

}  // namespace cpumoe
