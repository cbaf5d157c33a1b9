// The C interface: checks what a C program passes, and turns exceptions into statuses.
#include "capi/cpumoe.h"

#include <array>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "base/check.h"
#include "capi/runtime_options.h"
#include "dispatch/cpu_features.h"
#include "engine/call.h"
#include "engine/layer.h"
#include "engine/pending_call.h"
#include "engine/runtime.h"
#include "variant/build_id.h"

struct cpumoe_runtime {
  std::shared_ptr<cpumoe::Runtime> runtime;
};
struct cpumoe_layer {
  std::shared_ptr<cpumoe::Layer> layer;
  cpumoe::ScaleType scale_type = cpumoe::ScaleType::kOwn;  // of matrices that do not name another
  bool fp32_as_bf16 = false;  // whether its calls may round fp32 activations to bf16
};
struct cpumoe_call {
  cpumoe_call(const std::shared_ptr<cpumoe::Runtime>& runtime,
              const std::shared_ptr<cpumoe::Layer>& layer, const cpumoe::Call::Options& options)
      : call(runtime, layer, options) {}

  cpumoe::Call call;
};
struct cpumoe_pending {
  cpumoe::PendingCall call;
};

namespace cpumoe {
namespace {

thread_local std::string last_error;

cpumoe_status Fail(cpumoe_status status, const char* text) noexcept {
  try {
    last_error = text;
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return status;
}

cpumoe_status FailWith(const std::exception_ptr& error) noexcept {
  try {
    std::rethrow_exception(error);
  } catch (const std::invalid_argument& e) {
    return Fail(CPUMOE_INVALID_ARGUMENT, e.what());
  } catch (const std::out_of_range& e) {
    return Fail(CPUMOE_OUT_OF_RANGE, e.what());
  } catch (const OutOfMemory& e) {
    return Fail(CPUMOE_OUT_OF_MEMORY, e.what());
  } catch (const std::bad_alloc&) {
    return Fail(CPUMOE_OUT_OF_MEMORY, "the system does not give the memory that this needs");
  } catch (const std::system_error& e) {
    return Fail(CPUMOE_SYSTEM_ERROR, e.what());
  } catch (const std::exception& e) {
    return Fail(CPUMOE_FAILED, e.what());
  } catch (...) {
    return Fail(CPUMOE_FAILED, "unknown error");
  }
}

// Runs body(), which throws or returns a status.
template <class Body>
cpumoe_status Guarded(Body&& body) noexcept {
  try {
    return body();
  } catch (...) {
    return FailWith(std::current_exception());
  }
}

template <class T>
T& Given(T* pointer, const char* name) {
  RequireAddress(static_cast<const void*>(pointer), name);
  return *pointer;
}

// A value of an enumeration whose values are 0 to `last`. C may pass any number.
int32_t Known(int32_t value, int32_t last, const char* name) {
  Require(value >= 0 && value <= last, name, ": unknown value ", value);
  return value;
}

DType ToDType(int32_t dtype, const char* name) {
  constexpr std::array kDTypes = {DType::kBf16, DType::kFp16, DType::kFp32};
  return kDTypes[Known(dtype, CPUMOE_FP32, name)];
}

Glu ToGlu(const cpumoe_glu& glu) {
  const auto function =
      static_cast<GluFunction>(Known(glu.function, CPUMOE_GLU_GELU, "glu.function"));
  Require(std::isfinite(glu.alpha) && glu.alpha > 0,
          "glu.alpha: expected a positive and finite number, got ", glu.alpha);
  Require(function == GluFunction::kSilu || glu.alpha == 1,
          "glu.alpha: expected 1 for a function other than CPUMOE_GLU_SILU, got ", glu.alpha);
  Require(std::isfinite(glu.limit) && glu.limit >= 0,
          "glu.limit: expected a positive and finite number, or 0 for none, got ", glu.limit);
  Require(std::isfinite(glu.up_offset), "glu.up_offset: expected a finite number, got ",
          glu.up_offset);
  const bool capped = function == GluFunction::kSoftCappedSilu;
  for (const auto& [cap, name] : {std::pair{glu.gate_cap, "gate_cap"}, {glu.up_cap, "up_cap"}}) {
    Require(capped ? std::isfinite(cap) && cap > 0 : cap == 0, "glu.", name, ": expected ",
            capped ? "a positive and finite number" : "0 for a function without caps", ", got ",
            cap);
  }
  Require(glu.no_gate == 0 || glu.no_gate == 1, "glu.no_gate: expected 0 or 1, got ", glu.no_gate);
  Require(glu.no_gate == 0 || (!capped && glu.up_offset == 0),
          "glu.no_gate: expected 0 with caps or an offset of up, got 1");
  const float infinity = std::numeric_limits<float>::infinity();
  Glu result = {function, glu.alpha, glu.limit == 0 ? infinity : glu.limit, glu.up_offset};
  result.gated = glu.no_gate == 0;
  if (capped) {
    result.gate_cap = glu.gate_cap;
    result.up_cap = glu.up_cap;
  }
  return result;
}

ScaleType ScaleTypeOf(int32_t type, const std::string& name) {
  Require(type >= 0 && type < kScaleTypes, name, ": expected a cpumoe_scale_type, got ", type);
  return static_cast<ScaleType>(type);
}

std::shared_ptr<Layer> CreateLayer(const cpumoe_layer_options& options) {
  const int32_t precision = Known(options.precision, CPUMOE_PRECISION_INT8, "precision");
  const MoeConfig config = {
      .num_experts = options.num_experts,
      .hidden_size = options.hidden_size,
      .intermediate_size = options.intermediate_size,
      .glu = options.glu == nullptr ? Glu{} : ToGlu(*options.glu),
      .has_bias = options.has_bias != 0,
      .precision = precision == CPUMOE_PRECISION_INT8 ? Precision::kInt8 : Precision::kBf16,
      .batch_invariant = options.batch_invariant != 0};
  const std::string format = &Given(options.format, "format");
  std::optional<std::string> requested;
  if (options.variant != nullptr) requested = options.variant;
  const IsaChoice isa = SelectIsa(requested, "variant", DetectFeatures());
  return Layer::Create(isa.name, isa.origin, format, config,
                       ScaleTypeOf(options.scale_type, "scale_type"));
}

// Returns the distance of rows of `row` bytes: the one that the program gives, if it gives one.
int64_t Stride(int64_t given, int64_t row, int64_t rows, const std::string& name) {
  if (given == 0) return row;
  Require(given >= row, name, ": expected at least the ", row,
          " bytes of a row, or 0 for rows that follow each other, got ", given);
  RequireStride(given, rows, 1, name);
  return given;
}

// A matrix of `layer` that must be [rows, columns], and whose name must live as long as the view.
RawMatrix View(const cpumoe_matrix& matrix, int64_t rows, int64_t columns,
               const cpumoe_layer& layer, const std::string& name) {
  const FormatInfo& format = layer.layer->format();
  RawMatrix view = {.rows = matrix.rows,
                    .columns = matrix.columns,
                    .codes = static_cast<const std::byte*>(matrix.codes),
                    .scales = static_cast<const std::byte*>(matrix.scales),
                    .name = name.c_str()};
  // Before anything is computed from the sizes, which may be any numbers.
  view.RequireShape(rows, columns);
  RequireAddress(matrix.codes, name, ".codes");
  const int64_t usual = format.scale_depth == 0 ? kGroupSize : format.scale_depth;
  view.grid = {.rows = matrix.scale_rows == 0 ? 1 : matrix.scale_rows,
               .depth = matrix.scale_depth == 0 ? usual : matrix.scale_depth,
               .type = ScaleTypeOf(matrix.scale_type, name + ".scale_type")};
  if (view.grid.type == ScaleType::kOwn) view.grid.type = layer.scale_type;
  Require(view.grid.depth > 0, name, ".scale_depth: expected a positive number, or 0 for ", usual,
          ", got ", matrix.scale_depth);
  Require(view.grid.rows > 0, name, ".scale_rows: expected a positive number, or 0 for 1, got ",
          matrix.scale_rows);
  if (format.scale_bytes == 0) {
    Require(matrix.scales == nullptr, name, ".scales: expected NULL, because ", format.name,
            " has no scales");
  } else {
    RequireAddress(matrix.scales, name, ".scales");
  }
  view.factor = matrix.factor == 0 ? 1.0f : matrix.factor;
  view.codes_stride =
      Stride(matrix.codes_stride, columns * format.code_bits / 8, rows, name + ".codes_stride");
  const int64_t scale_bytes = view.grid.type == ScaleType::kOwn
                                  ? format.scale_bytes
                                  : VisitScaleType<NoScale>(view.grid.type, []<class Scale>(Scale) {
                                      return kBytesOfScale<Scale>;
                                    });
  view.scales_stride = Stride(matrix.scales_stride, view.scale_columns() * scale_bytes,
                              view.scale_rows(), name + ".scales_stride");
  return view;
}

void Pack(cpumoe_layer& layer, Runtime& runtime, int64_t first,
          std::span<const cpumoe_expert> experts) {
  const MoeConfig& config = layer.layer->config();
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  config.RequireExperts(first, static_cast<int64_t>(experts.size()));
  std::vector<std::array<std::string, 3>> names(experts.size());
  std::vector<ExpertSource> sources(experts.size());
  for (size_t i = 0; i < experts.size(); ++i) {
    const cpumoe_expert& expert = experts[i];
    const std::string name = Message("expert ", first + static_cast<int64_t>(i), ": ");
    names[i] = {name + "gate", name + "up", name + "down"};
    RawMatrix gate = {.codes = static_cast<const std::byte*>(expert.gate.codes),
                      .name = names[i][0].c_str()};
    if (config.glu.gated) gate = View(expert.gate, intermediate, hidden, layer, names[i][0]);
    sources[i] = {.gate = gate,
                  .up = View(expert.up, intermediate, hidden, layer, names[i][1]),
                  .down = View(expert.down, hidden, intermediate, layer, names[i][2]),
                  .gate_bias = expert.gate_bias,
                  .up_bias = expert.up_bias,
                  .down_bias = expert.down_bias};
  }
  layer.layer->Pack(runtime, first, sources);
}

Call::Options CallOptions(const cpumoe_call_options& options, const cpumoe_layer& layer) {
  return {.input_dtype = ToDType(options.input_dtype, "input_dtype"),
          .output_dtype = ToDType(options.output_dtype, "output_dtype"),
          .accumulate = options.accumulate != 0,
          .fp32_as_bf16 = layer.fp32_as_bf16,
          .top_k = options.top_k,
          .ids_are_64_bit = options.ids_are_64_bit != 0,
          .mask = options.mask};
}

Call::Tensors ToTensors(const cpumoe_tensors& tensors, int64_t hidden_size) {
  Require(tensors.hidden_stride == 0 || tensors.hidden_stride >= hidden_size,
          "hidden_stride: expected at least the ", hidden_size,
          " elements of a row, or 0 for rows that follow each other, got ", tensors.hidden_stride);
  return {.hidden_states = tensors.hidden_states,
          .hidden_stride = tensors.hidden_stride == 0 ? hidden_size : tensors.hidden_stride,
          .tokens = tensors.tokens,
          .ids = tensors.ids,
          .weights = tensors.weights,
          .output = tensors.output};
}

}  // namespace
}  // namespace cpumoe

using namespace cpumoe;  // NOLINT(google-build-using-namespace): all of the file below is C

const char* cpumoe_get_version(void) noexcept { return kVersion; }
const char* cpumoe_get_build_id(void) noexcept { return kBuildId; }
const char* cpumoe_last_error(void) noexcept { return last_error.c_str(); }

cpumoe_status cpumoe_runtime_create(const cpumoe_runtime_options* options,
                                    cpumoe_runtime** out) noexcept {
  return Guarded([&] {
    Given(out, "out");
    const cpumoe_runtime_options given = options == nullptr ? cpumoe_runtime_options{} : *options;
    auto made = std::make_unique<cpumoe_runtime>();
    Node::Options node = ToNodeOptions(given);
    const bool callers_compute = given.callers_wait == 0 && node.nodes.empty();
    made->runtime = Runtime::Create({.node = std::move(node), .callers_compute = callers_compute});
    *out = made.release();
    return CPUMOE_OK;
  });
}

void cpumoe_runtime_destroy(cpumoe_runtime* runtime) noexcept {
  if (runtime != nullptr) runtime->runtime->Close();
  delete runtime;
}

cpumoe_status cpumoe_layer_create(const cpumoe_layer_options* options,
                                  cpumoe_layer** out) noexcept {
  return Guarded([&] {
    Given(out, "out");
    const cpumoe_layer_options& given = Given(options, "options");
    auto made = std::make_unique<cpumoe_layer>();
    made->layer = CreateLayer(given);
    made->scale_type = ScaleTypeOf(given.scale_type, "scale_type");
    made->fp32_as_bf16 = given.precision == CPUMOE_PRECISION_BF16;
    *out = made.release();
    return CPUMOE_OK;
  });
}

void cpumoe_layer_destroy(cpumoe_layer* layer) noexcept { delete layer; }

const char* cpumoe_layer_variant(const cpumoe_layer* layer) noexcept {
  return layer == nullptr ? "" : layer->layer->isa().c_str();
}

size_t cpumoe_layer_nbytes(const cpumoe_layer* layer) noexcept {
  return layer == nullptr ? 0 : layer->layer->nbytes();
}

cpumoe_status cpumoe_layer_pack(cpumoe_layer* layer, cpumoe_runtime* runtime, int64_t first,
                                const cpumoe_expert* experts, int64_t count) noexcept {
  return Guarded([&] {
    RequireCount(count, "count");
    cpumoe_layer& into = Given(layer, "layer");
    cpumoe_runtime& on = Given(runtime, "runtime");
    if (count > 0) RequireAddress(experts, "experts");
    Pack(into, *on.runtime, first, {experts, static_cast<size_t>(count)});
    return CPUMOE_OK;
  });
}

cpumoe_status cpumoe_layer_evict(cpumoe_layer* layer, int64_t expert) noexcept {
  return Guarded([&] {
    Given(layer, "layer").layer->Evict(expert);
    return CPUMOE_OK;
  });
}

cpumoe_status cpumoe_call_create(cpumoe_runtime* runtime, cpumoe_layer* layer,
                                 const cpumoe_call_options* options, cpumoe_call** out) noexcept {
  return Guarded([&] {
    Given(out, "out");
    cpumoe_runtime& on = Given(runtime, "runtime");
    cpumoe_layer& of = Given(layer, "layer");
    const Call::Options fixed = CallOptions(Given(options, "options"), of);
    *out = std::make_unique<cpumoe_call>(on.runtime, of.layer, fixed).release();
    return CPUMOE_OK;
  });
}

void cpumoe_call_destroy(cpumoe_call* call) noexcept { delete call; }

cpumoe_status cpumoe_call_bind(cpumoe_call* call, const cpumoe_tensors* tensors) noexcept {
  return Guarded([&] {
    Call& self = Given(call, "call").call;
    self.Bind(ToTensors(Given(tensors, "tensors"), self.layer().config().hidden_size));
    return CPUMOE_OK;
  });
}

cpumoe_status cpumoe_call_run(cpumoe_call* call) noexcept {
  return Guarded([&] {
    Given(call, "call").call.ExecuteBound();
    return CPUMOE_OK;
  });
}

void cpumoe_call_callback(void* call) noexcept {
  if (call != nullptr) static_cast<cpumoe_call*>(call)->call.Run();
}

cpumoe_status cpumoe_call_take_error(cpumoe_call* call) noexcept {
  return Guarded([&] {
    const std::exception_ptr error = Given(call, "call").call.TakeError();
    if (error != nullptr) std::rethrow_exception(error);
    return CPUMOE_OK;
  });
}

cpumoe_status cpumoe_call_submit(cpumoe_call* call, int32_t copy_inputs,
                                 cpumoe_pending** out) noexcept {
  return Guarded([&] {
    Given(out, "out");
    const Call& self = Given(call, "call").call;
    // Allocated before the run is queued. Nothing can fail once the run uses the caller's memory.
    auto pending = std::make_unique<cpumoe_pending>();
    pending->call = PendingCall(self.SubmitBound(copy_inputs != 0));
    *out = pending.release();
    return CPUMOE_OK;
  });
}

cpumoe_status cpumoe_pending_wait(cpumoe_pending* pending, double seconds) noexcept {
  return Guarded([&] {
    PendingCall& call = Given(pending, "pending").call;
    Require(!std::isnan(seconds), "seconds: expected a number, got nan");
    if (std::isinf(seconds) && seconds > 0) {
      call.Wait();
      return CPUMOE_OK;
    }
    if (!call.WaitFor(seconds)) {
      return Fail(CPUMOE_TIMEOUT, Message("the call has not ended within ", seconds, " s").c_str());
    }
    call.Wait();  // rethrows what the run threw
    return CPUMOE_OK;
  });
}

void cpumoe_pending_destroy(cpumoe_pending* pending) noexcept { delete pending; }
