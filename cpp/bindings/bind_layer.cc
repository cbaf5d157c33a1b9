// The weights of a layer of experts: its configuration and the layer itself.
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bindings/bindings.h"
#include "bindings/matrix_args.h"
#include "bindings/submitted_call.h"
#include "engine/layer.h"
#include "engine/runtime.h"
#include "moe/moe.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

// The gate, up and down matrices of an expert, and the addresses of its three biases if it has
// biases.
using ExpertArgs = std::pair<std::array<MatrixArgs, 3>, std::optional<std::array<uintptr_t, 3>>>;

void Pack(Layer& self, Runtime& runtime, const std::vector<int64_t>& experts,
          const std::vector<ExpertArgs>& weights) {
  Require(experts.size() == weights.size(), "experts: expected one index for each of the ",
          weights.size(), " experts, got ", experts.size());
  std::vector<ExpertSource> sources;
  sources.reserve(weights.size());
  for (const auto& [matrices, biases] : weights) {
    ExpertSource& source = sources.emplace_back();
    source.gate = matrices[0].View<const std::byte>();
    source.up = matrices[1].View<const std::byte>();
    source.down = matrices[2].View<const std::byte>();
    if (!biases) continue;
    constexpr std::array kNames = {"gate_bias", "up_bias", "down_bias"};
    for (size_t i = self.config().glu.gated ? 0 : 1; i < kNames.size(); ++i) {
      RequireAddress(AsPointer((*biases)[i]), "expert ", experts[sources.size() - 1], ": ",
                     kNames[i]);
    }
    source.gate_bias = reinterpret_cast<const float*>((*biases)[0]);
    source.up_bias = reinterpret_cast<const float*>((*biases)[1]);
    source.down_bias = reinterpret_cast<const float*>((*biases)[2]);
  }
  self.Pack(runtime, experts, sources);
}

// The gate, up and down matrices of a shard, and its first intermediate feature.
using ShardArgs = std::pair<std::array<MatrixArgs, 3>, int64_t>;

std::vector<ExpertDestination> Destinations(const std::vector<ShardArgs>& shards) {
  std::vector<ExpertDestination> out;
  out.reserve(shards.size());
  for (const auto& [matrices, begin] : shards) {
    out.push_back({.gate = matrices[0].View<std::byte>(),
                   .up = matrices[1].View<std::byte>(),
                   .down = matrices[2].View<std::byte>(),
                   .intermediate_begin = begin});
  }
  return out;
}

void Unpack(const Layer& self, Runtime& runtime, int64_t expert,
            const std::vector<ShardArgs>& shards) {
  self.Unpack(runtime, expert, Destinations(shards));
}

std::unique_ptr<SubmittedCall> SubmitUnpack(const std::shared_ptr<Layer>& self, Runtime& runtime,
                                            int64_t expert, std::vector<ShardArgs> shards,
                                            py::object owned) {
  auto call = std::make_unique<SubmittedCall>(std::move(owned));
  const py::gil_scoped_release release;
  const auto names = std::make_shared<std::vector<ShardArgs>>(std::move(shards));
  call->Start(PendingCall(Layer::SubmitUnpack(self, runtime, expert, Destinations(*names))), names);
  return call;
}

}  // namespace

void BindLayer(py::module_& m) {
  py::enum_<Precision>(m, "Precision")
      .value("BF16", Precision::kBf16)
      .value("INT8", Precision::kInt8);

  py::enum_<GluFunction>(m, "GluFunction")
      .value("SILU", GluFunction::kSilu)
      .value("GELU_TANH", GluFunction::kGeluTanh)
      .value("RELU", GluFunction::kRelu)
      .value("RELU2", GluFunction::kRelu2)
      .value("SOFTCAPPED_SILU", GluFunction::kSoftCappedSilu)
      .value("GELU", GluFunction::kGelu);

  py::class_<MoeConfig>(m, "MoeConfig")
      .def(py::init([](int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                       GluFunction glu_function, float alpha, std::optional<float> limit,
                       float up_offset, std::optional<float> gate_cap, std::optional<float> up_cap,
                       bool gated, bool has_bias, Precision precision, bool batch_invariant,
                       int few_token_limit, std::vector<int32_t> copy_of) {
             const float infinity = std::numeric_limits<float>::infinity();
             return MoeConfig{.num_experts = num_experts,
                              .hidden_size = hidden_size,
                              .intermediate_size = intermediate_size,
                              .glu = {glu_function, alpha, limit.value_or(infinity), up_offset,
                                      gate_cap.value_or(1.0f), up_cap.value_or(1.0f), gated},
                              .has_bias = has_bias,
                              .precision = precision,
                              .batch_invariant = batch_invariant,
                              .few_token_limit = few_token_limit,
                              .copy_of = std::move(copy_of)};
           }),
           py::kw_only(), py::arg("num_experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("glu_function"), py::arg("alpha"),
           py::arg("limit"), py::arg("up_offset"), py::arg("gate_cap") = py::none(),
           py::arg("up_cap") = py::none(), py::arg("gated") = true, py::arg("has_bias"),
           py::arg("precision"), py::arg("batch_invariant"), py::arg("few_token_limit"),
           py::arg("copy_of") = std::vector<int32_t>());

  py::class_<Layer::Statistics>(m, "LayerStatistics")
      .def_readonly("calls", &Layer::Statistics::calls)
      .def_readonly("seconds", &Layer::Statistics::seconds)
      .def_readonly("bytes_read", &Layer::Statistics::bytes_read)
      .def_readonly("expert_tokens", &Layer::Statistics::expert_tokens);

  py::class_<Layer, std::shared_ptr<Layer>>(m, "Layer")
      .def(py::init([](const std::string& isa, const std::string& origin, const std::string& format,
                       MoeConfig config, ScaleType scale_type,
                       const std::optional<std::shared_ptr<Runtime>>& runtime) {
             if (runtime) config.nodes = (*runtime)->nodes();
             return Layer::Create(isa, origin, format, config, scale_type);
           }),
           py::kw_only(), py::arg("isa"), py::arg("origin"), py::arg("format"), py::arg("config"),
           py::arg("scale_type") = ScaleType::kOwn, py::arg("runtime") = py::none())
      .def("placement", &Layer::placement, py::call_guard<py::gil_scoped_release>(),
           "Where the packed experts lie, a share for each node of the runtime.")
      .def("packed_bytes", &Layer::packed_bytes, py::call_guard<py::gil_scoped_release>(),
           "The bytes of the experts that are packed now.")
      .def("packed", &Layer::packed, py::call_guard<py::gil_scoped_release>(),
           "One number per expert; 0: it has no weights.")
      .def("scales", &Layer::Scales, py::kw_only(), py::arg("expert"),
           py::call_guard<py::gil_scoped_release>(),
           "How many rows and successive k of the stored gate, up and down share a scale, the "
           "scales' types, and the matrices' factors.")
      .def("pack", &Pack, py::kw_only(), py::arg("runtime"), py::arg("experts"), py::arg("weights"),
           py::call_guard<py::gil_scoped_release>())
      .def("evict", &Layer::Evict, py::kw_only(), py::arg("expert"),
           py::call_guard<py::gil_scoped_release>(),
           "Gives the memory of an expert's weights back to the system, once no call uses them.")
      .def(
          "set_mask",
          [](Layer& self, uintptr_t mask) { self.SetMask(reinterpret_cast<const uint8_t*>(mask)); },
          py::kw_only(), py::arg("mask"), py::call_guard<py::gil_scoped_release>(),
          "Sets the mask by its address: a byte per expert, not 0 if calls skip the expert. Calls "
          "read the mask until another one is set.")
      .def("evict_masked", &Layer::EvictMasked, py::call_guard<py::gil_scoped_release>(),
           "Gives the memory of all experts that the mask skips back to the system.")
      .def("require_own_process", &Layer::RequireOwnProcess,
           "Raises RuntimeError in a forked child, which must not change the layer.")
      .def("statistics", &Layer::statistics, "Sums over all calls since the layer was made.")
      .def("unpack", &Unpack, py::kw_only(), py::arg("runtime"), py::arg("expert"),
           py::arg("shards"), py::call_guard<py::gil_scoped_release>(),
           "Writes shards of an expert: the matrices gate, up and down of each, and its first "
           "feature.")
      .def("submit_unpack", &SubmitUnpack, py::kw_only(), py::arg("runtime"), py::arg("expert"),
           py::arg("shards"), py::arg("owned"),
           "Lets the runtime's driver unpack. `owned` lives until the call has ended.");
}

}  // namespace cpumoe
