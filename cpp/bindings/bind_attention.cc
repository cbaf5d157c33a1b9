// Attention. Python passes addresses that it has checked.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "engine/attention_call.h"
#include "engine/runtime.h"

namespace py = pybind11;

namespace cpumoe {

void BindAttention(py::module_& m) {
  py::enum_<MaskType>(m, "MaskType", "What an attention mask has for a query and a key.")
      .value("NONE", MaskType::kNone)
      .value("BOOL", MaskType::kBool)
      .value("BF16", MaskType::kBf16)
      .value("FP16", MaskType::kFp16)
      .value("FP32", MaskType::kFp32);

  // A tuple, because converting many arguments takes longer than taking them out of one.
  using Strided = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
  constexpr auto kView = [](const Strided& tensor) {
    const auto& [data, batch, head, row] = tensor;
    return HeadsOf<const void*>{AsPointer(data), batch, head, row};
  };

  py::class_<AttentionCall>(m, "AttentionCall")
      .def(py::init<std::shared_ptr<Runtime>, const std::string&, const std::string&>(),
           py::kw_only(), py::arg("runtime"), py::arg("isa"), py::arg("origin"))
      .def(
          "run",
          [kView](const AttentionCall& self, DType dtype, const std::array<int64_t, 7>& sizes,
                  const Strided& q, const Strided& k, const Strided& v, const Strided& output,
                  float scale, bool causal, int64_t window, float softcap, MaskType mask_type,
                  const Strided& mask, uintptr_t sinks) {
            const auto& [batch, heads, kv_heads, queries, keys, head_size, value_size] = sizes;
            const auto& [data, batch_stride, head_stride, row_stride] = output;
            self.Execute(
                {.dtype = dtype,
                 .batch = batch,
                 .heads = heads,
                 .kv_heads = kv_heads,
                 .queries = queries,
                 .keys = keys,
                 .head_size = head_size,
                 .value_size = value_size,
                 .scale = scale,
                 .softcap = softcap,
                 .causal = causal,
                 .window = window,
                 .q = kView(q),
                 .k = kView(k),
                 .v = kView(v),
                 .output = {reinterpret_cast<void*>(data), batch_stride, head_stride, row_stride},
                 .mask_type = mask_type,
                 .mask = kView(mask),
                 .sinks = static_cast<const float*>(AsPointer(sinks))});
          },
          py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("output"), py::arg("scale"), py::arg("causal"), py::arg("window"),
          py::arg("softcap"), py::arg("mask_type"), py::arg("mask"), py::arg("sinks"),
          py::call_guard<py::gil_scoped_release>(),
          "sizes: batch, heads, kv_heads, queries, keys, head_size, value_size. A tensor is its "
          "address and the strides of batch, head and row in elements.");
}

}  // namespace cpumoe
