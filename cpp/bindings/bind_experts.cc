#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bindings/bindings.h"
#include "bindings/runtime.h"
#include "dispatch/variant_loader.h"
#include "moe/moe.h"
#include "moe/pack_experts.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

// Throws std::invalid_argument if `address` is null. `name` names the argument in the message.
template <class... Parts>
void RequireAddress(uintptr_t address, const Parts&... name) {
  Require(address != 0, name..., ": expected an address, got a null pointer");
}
template <class... Parts>
void RequireSize(int64_t size, const Parts&... name) {
  Require(size >= 0, name..., ": expected 0 or more, got ", size);
}

// A matrix as Python describes it, with addresses and strides in bytes.
struct MatrixArgs {
  std::string name;
  int64_t rows, columns;
  uintptr_t codes;
  int64_t codes_stride;
  uintptr_t scales;
  int64_t scales_stride;

  template <class Byte>
  RawMatrixOf<Byte> View() const {
    return {rows,
            columns,
            reinterpret_cast<Byte*>(codes),
            codes_stride,
            reinterpret_cast<Byte*>(scales),
            scales_stride,
            name.c_str()};
  }
};

// Addresses and properties of a forward call's tensors.
struct ForwardTensors {
  uintptr_t hidden_states;
  int64_t hidden_stride;
  int64_t tokens;
  DType element;
  uintptr_t ids;
  bool ids_are_64_bit;
  uintptr_t weights;
  int64_t top_k;
  uintptr_t mask;  // 0 if there is no mask
  uintptr_t output;
  bool fp32_as_bf16;

  void CheckAddresses() const {
    RequireSize(tokens, "tokens");
    RequireSize(top_k, "top_k");
    if (tokens == 0) return;
    RequireAddress(hidden_states, "hidden_states");
    RequireAddress(output, "output");
    if (top_k == 0) return;
    RequireAddress(ids, "ids");
    RequireAddress(weights, "weights");
  }

  ForwardArgs View() const {
    return {.routing = {.ids = reinterpret_cast<const void*>(ids),
                        .ids_are_64_bit = ids_are_64_bit,
                        .weights = reinterpret_cast<const float*>(weights),
                        .mask = reinterpret_cast<const uint8_t*>(mask),
                        .top_k = top_k},
            .input_dtype = element,
            .output_dtype = element,
            .fp32_as_bf16 = fp32_as_bf16,
            .hidden_states = reinterpret_cast<const void*>(hidden_states),
            .hidden_stride = hidden_stride,
            .tokens = tokens,
            .output = reinterpret_cast<void*>(output)};
  }
};

std::shared_ptr<Moe> Create(const std::string& isa, const std::string& origin,
                            const std::string& format, const MoeConfig& config) {
  return std::shared_ptr<Moe>(FindFormat(LoadVariant(isa, origin), format).create(config));
}

// The gate, up and down matrices of an expert, and the addresses of its three biases if it has
// biases.
using ExpertArgs = std::pair<std::array<MatrixArgs, 3>, std::optional<std::array<uintptr_t, 3>>>;

void Pack(Moe& self, Runtime& runtime, int64_t first, const std::vector<ExpertArgs>& experts) {
  std::vector<ExpertSource> sources;
  sources.reserve(experts.size());
  for (const auto& [matrices, biases] : experts) {
    ExpertSource& source = sources.emplace_back();
    source.gate = matrices[0].View<const std::byte>();
    source.up = matrices[1].View<const std::byte>();
    source.down = matrices[2].View<const std::byte>();
    if (!biases) continue;
    constexpr std::array kNames = {"gate_bias", "up_bias", "down_bias"};
    for (size_t i = 0; i < kNames.size(); ++i) {
      RequireAddress((*biases)[i], "expert ", first + std::ssize(sources) - 1, ": ", kNames[i]);
    }
    source.gate_bias = reinterpret_cast<const float*>((*biases)[0]);
    source.up_bias = reinterpret_cast<const float*>((*biases)[1]);
    source.down_bias = reinterpret_cast<const float*>((*biases)[2]);
  }
  runtime.Execute([&](ThreadPool& pool, Workspace&) { PackExperts(self, first, sources, pool); });
}

void Unpack(const Moe& self, Runtime& runtime, int64_t expert,
            const std::array<MatrixArgs, 3>& matrices, int64_t intermediate_begin) {
  const ExpertDestination out = {.gate = matrices[0].View<std::byte>(),
                                 .up = matrices[1].View<std::byte>(),
                                 .down = matrices[2].View<std::byte>(),
                                 .intermediate_begin = intermediate_begin};
  runtime.Execute([&](ThreadPool& pool, Workspace&) { self.Unpack(expert, out, pool); });
}

void Forward(const Moe& self, Runtime& runtime, const ForwardTensors& tensors) {
  runtime.Execute([&](ThreadPool& pool, Workspace& workspace) {
    self.Forward(tensors.View(), pool, workspace);
  });
}

// A call that the driver thread makes. A SubmittedCall owns everything that the call reads and
// writes, from before the call is queued until it has ended. Therefore the destructor waits for the
// call, even if an exception causes the destruction.
class SubmittedCall {
 public:
  explicit SubmittedCall(py::object owned) : owned_(std::move(owned)) {}
  ~SubmittedCall() {
    if (completion_ == nullptr) return;
    const py::gil_scoped_release release;
    try {
      completion_->WaitFor(std::chrono::nanoseconds::max());
    } catch (const std::exception&) {
      // This process is a forked child, in which no thread makes the call.
    }
  }
  SubmittedCall(const SubmittedCall&) = delete;
  SubmittedCall& operator=(const SubmittedCall&) = delete;

  void Start(std::shared_ptr<Completion> completion) { completion_ = std::move(completion); }

  bool Done() const { return completion_->Done(); }
  void Wait() { completion_->Wait(); }
  bool WaitFor(double seconds) {
    const double bounded = std::clamp(seconds, 0.0, 1e9);  // 2^63 ns are 9.2e9 s
    return completion_->WaitFor(std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::duration<double>(bounded)));
  }

 private:
  py::object owned_;
  std::shared_ptr<Completion> completion_;
};

std::unique_ptr<SubmittedCall> Submit(const std::shared_ptr<const Moe>& self, Runtime& runtime,
                                      const ForwardTensors& tensors, py::object owned) {
  auto call = std::make_unique<SubmittedCall>(std::move(owned));
  const py::gil_scoped_release release;
  call->Start(runtime.Submit([self, tensors](ThreadPool& pool, Workspace& workspace) {
    self->Forward(tensors.View(), pool, workspace);
  }));
  return call;
}

}  // namespace

void BindExperts(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("BF16", DType::kBf16)
      .value("FP16", DType::kFp16)
      .value("FP32", DType::kFp32);

  py::enum_<Precision>(m, "Precision")
      .value("BF16", Precision::kBf16)
      .value("INT8", Precision::kInt8);

  py::class_<MoeConfig>(m, "MoeConfig")
      .def(py::init([](int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                       float alpha, std::optional<float> limit, float up_offset, bool has_bias,
                       Precision precision, bool batch_invariant, int few_token_limit) {
             const float infinity = std::numeric_limits<float>::infinity();
             return MoeConfig{.num_experts = num_experts,
                              .hidden_size = hidden_size,
                              .intermediate_size = intermediate_size,
                              .swiglu = {alpha, limit.value_or(infinity), up_offset},
                              .has_bias = has_bias,
                              .precision = precision,
                              .batch_invariant = batch_invariant,
                              .few_token_limit = few_token_limit};
           }),
           py::kw_only(), py::arg("num_experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("alpha"), py::arg("limit"), py::arg("up_offset"),
           py::arg("has_bias"), py::arg("precision"), py::arg("batch_invariant"),
           py::arg("few_token_limit"));

  py::class_<MatrixArgs>(m, "Matrix")
      .def(py::init([](std::string name, int64_t rows, int64_t columns, uintptr_t codes,
                       int64_t codes_stride, uintptr_t scales, int64_t scales_stride) {
             RequireSize(rows, name, " rows");
             RequireSize(columns, name, " columns");
             if (rows > 0 && columns > 0) {
               RequireAddress(codes, name, " codes");
               RequireAddress(scales, name, " scales");
             }
             return MatrixArgs{std::move(name), rows,   columns,      codes,
                               codes_stride,    scales, scales_stride};
           }),
           py::arg("name"), py::arg("rows"), py::arg("columns"), py::arg("codes"),
           py::arg("codes_stride"), py::arg("scales"), py::arg("scales_stride"));

  py::class_<ForwardTensors>(m, "ForwardTensors")
      .def(py::init([](uintptr_t hidden_states, int64_t hidden_stride, int64_t tokens,
                       DType element, uintptr_t ids, bool ids_are_64_bit, uintptr_t weights,
                       int64_t top_k, uintptr_t mask, uintptr_t output, bool fp32_as_bf16) {
             const ForwardTensors tensors{hidden_states, hidden_stride,  tokens,      element,
                                          ids,           ids_are_64_bit, weights,     top_k,
                                          mask,          output,         fp32_as_bf16};
             tensors.CheckAddresses();
             return tensors;
           }),
           py::arg("hidden_states"), py::arg("hidden_stride"), py::arg("tokens"),
           py::arg("element"), py::arg("ids"), py::arg("ids_are_64_bit"), py::arg("weights"),
           py::arg("top_k"), py::arg("mask"), py::arg("output"), py::arg("fp32_as_bf16") = false);

  py::class_<SubmittedCall>(m, "SubmittedCall")
      .def("done", &SubmittedCall::Done)
      .def("wait", &SubmittedCall::Wait, py::call_guard<py::gil_scoped_release>())
      .def("wait_for", &SubmittedCall::WaitFor, py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>());

  py::class_<Moe, std::shared_ptr<Moe>>(m, "Moe")
      .def(py::init(&Create), py::arg("isa"), py::arg("origin"), py::arg("format"),
           py::arg("config"))
      .def_property_readonly("nbytes", &Moe::nbytes)
      .def("pack", &Pack, py::arg("runtime"), py::arg("first"), py::arg("experts"),
           py::call_guard<py::gil_scoped_release>())
      .def("unpack", &Unpack, py::arg("runtime"), py::arg("expert"), py::arg("matrices"),
           py::arg("intermediate_begin"), py::call_guard<py::gil_scoped_release>())
      .def("forward", &Forward, py::arg("runtime"), py::arg("tensors"),
           py::call_guard<py::gil_scoped_release>())
      .def("submit", &Submit, py::arg("runtime"), py::arg("tensors"), py::arg("owned"));
}

}  // namespace cpumoe
