// Calls whose tensors belong to a stream. Python passes addresses and streams as integers.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/call_tensors.h"
#include "engine/layer.h"
#include "engine/runtime.h"
#include "streams/bridge.h"
#include "streams/cuda_driver.h"
#include "streams/host_driver.h"
#include "streams/stream_call.h"
#include "streams/transfer_buffer.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

// Destroying a bridge or a call waits for streams. Another library's function on a stream may need
// the GIL meanwhile.
struct DeleteWithoutGil {
  template <class T>
  void operator()(T* object) const {
    if (PyGILState_Check() == 0) {
      delete object;
      return;
    }
    const py::gil_scoped_release release;
    delete object;
  }
};

std::shared_ptr<Bridge> MakeBridge(bool cuda, int64_t buffer_bytes, int64_t captured_bytes,
                                   bool wait_by_function) {
  const std::shared_ptr<StreamDriver> driver =
      cuda ? OpenCudaDriver() : std::make_shared<HostDriver>();
  const Lane::Options lanes = {.buffer_bytes = buffer_bytes,
                               .captured_bytes = captured_bytes,
                               .wait_by_function = wait_by_function};
  return {new Bridge(driver, lanes), DeleteWithoutGil()};
}

// Keeps a Python object alive, for owners that may let it go without the GIL.
std::shared_ptr<const void> Keep(py::object object) {
  return {object.release().ptr(), [](PyObject* owned) {
            const py::gil_scoped_acquire acquire;
            Py_DECREF(owned);
          }};
}

using StreamCallHolder = std::unique_ptr<StreamCall, DeleteWithoutGil>;

StreamCallHolder MakeStreamCall(std::shared_ptr<Bridge> bridge, std::shared_ptr<Runtime> runtime,
                                std::shared_ptr<Layer> layer, DType input_dtype, DType output_dtype,
                                bool fp32_as_bf16, int64_t top_k, bool ids_are_64_bit,
                                uintptr_t mask, py::object mask_owner, bool skip_unknown_ids,
                                int64_t deferred_experts, int64_t layer_index) {
  return StreamCallHolder(new StreamCall(std::move(bridge), std::move(runtime), std::move(layer),
                                         {.call = {.input_dtype = input_dtype,
                                                   .output_dtype = output_dtype,
                                                   .fp32_as_bf16 = fp32_as_bf16,
                                                   .top_k = top_k,
                                                   .ids_are_64_bit = ids_are_64_bit,
                                                   .mask = reinterpret_cast<const uint8_t*>(mask)},
                                          .mask_owner = Keep(std::move(mask_owner)),
                                          .skip_unknown_ids = skip_unknown_ids,
                                          .deferred_experts = deferred_experts,
                                          .layer_index = layer_index}));
}

void Submit(StreamCall& self, StreamHandle stream, uintptr_t hidden_states, int64_t hidden_stride,
            int64_t tokens, uintptr_t ids, uintptr_t weights, uintptr_t output) {
  self.Submit(stream, TensorsAt(hidden_states, hidden_stride, tokens, ids, weights, output));
}

}  // namespace

void BindStream(py::module_& m) {
  py::class_<Bridge, std::shared_ptr<Bridge>>(m, "Bridge")
      .def(py::init(&MakeBridge), py::kw_only(), py::arg("cuda"), py::arg("buffer_bytes"),
           py::arg("captured_bytes"), py::arg("wait_by_function") = false,
           "What the calls of a model's layers share. cuda=False: tensors are the CPU's, and any "
           "number names a stream.")
      .def("prepare", &Bridge::Prepare, py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "Allocates what calls on a stream need, which a capture could not do.");
  m.def(
      "stream_buffer_bytes",
      [](int64_t hidden_size, DType input_dtype, DType output_dtype, int64_t top_k,
         bool ids_are_64_bit, int64_t tokens) {
        return TransferLayout::BufferBytes(hidden_size,
                                           {.input_dtype = input_dtype,
                                            .output_dtype = output_dtype,
                                            .top_k = top_k,
                                            .ids_are_64_bit = ids_are_64_bit},
                                           tokens);
      },
      py::kw_only(), py::arg("hidden_size"), py::arg("input_dtype"), py::arg("output_dtype"),
      py::arg("top_k"), py::arg("ids_are_64_bit"), py::arg("tokens"),
      "The bytes of a buffer through which calls of up to so many tokens go in one piece.");

  py::class_<StreamCall, StreamCallHolder>(m, "StreamCall")
      .def(py::init(&MakeStreamCall), py::kw_only(), py::arg("bridge"), py::arg("runtime"),
           py::arg("layer"), py::arg("input_dtype"), py::arg("output_dtype"),
           py::arg("fp32_as_bf16") = false, py::arg("top_k"), py::arg("ids_are_64_bit"),
           py::arg("mask") = 0, py::arg("mask_owner") = py::none(),
           py::arg("skip_unknown_ids") = false, py::arg("deferred_experts") = 0,
           py::arg("layer_index") = 0)
      .def("submit", &Submit, py::arg("stream"), py::arg("hidden_states"), py::arg("hidden_stride"),
           py::arg("tokens"), py::arg("ids"), py::arg("weights"), py::arg("output"),
           py::call_guard<py::gil_scoped_release>(),
           "Queues the first half of a call: inputs are copied, and the experts' job starts.")
      .def("sync", &StreamCall::Sync, py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
           "Queues the second half: the stream waits for the job and copies its output.")
      .def("raise_error", &StreamCall::ThrowError,
           "Raises the error of a job, if one has failed and nothing has raised its error yet.")
      .def("wait", &StreamCall::Wait, py::call_guard<py::gil_scoped_release>(),
           "Waits until all calls have ended. Returns False if nobody can tell, as during a "
           "capture.")
      .def("take_left_out", &StreamCall::TakeLeftOut,
           "The layer whose deferred experts a call has left out, because its pass ended early. "
           "Each is returned once; None: there is none.")
      .def_property_readonly("captured_plans", &StreamCall::captured_plans,
                             "How many jobs graphs have recorded.");
}

}  // namespace cpumoe
