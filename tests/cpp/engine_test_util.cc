#include "cpp/engine_test_util.h"

#include <exception>

#include "dispatch/cpu_features.h"

namespace cpumoe {

EngineCase::EngineCase(const BatchSpec& spec, const LayerSpec& layer)
    : weights_("mxfp4", layer),
      batch_(weights_.config(), spec),
      layer_(
          Layer::Create(UsableIsas(DetectFeatures()).back(), "test", "mxfp4", weights_.config())) {
  const auto runtime = Runtime::Create({});
  std::vector<ExpertSource> sources;
  for (int64_t e = 0; e < layer.experts; ++e) sources.push_back(weights_.Source(e));
  layer_->Pack(*runtime, 0, sources);
  expected_ = Output();
  Call(runtime, layer_, Options()).Execute(Tensors(expected_));
}

std::vector<std::byte> EngineCase::Output() const {
  const int64_t elements = batch_.spec().tokens * weights_.config().hidden_size;
  return std::vector<std::byte>(elements * ByteSize(batch_.spec().OutputDType()), std::byte{0xff});
}

Call::Options EngineCase::Options() const {
  const ForwardArgs args = batch_.Args(nullptr);
  return {.input_dtype = args.input_dtype,
          .output_dtype = args.output_dtype,
          .top_k = args.routing.top_k,
          .ids_are_64_bit = args.routing.ids_are_64_bit,
          .mask = args.routing.mask};
}

Call::Tensors EngineCase::Tensors(std::vector<std::byte>& output) const {
  const ForwardArgs args = batch_.Args(output.data());
  return {.hidden_states = args.hidden_states,
          .hidden_stride = args.hidden_stride,
          .tokens = args.tokens,
          .ids = args.routing.ids,
          .weights = args.routing.weights,
          .output = args.output};
}

std::string MessageOf(const std::exception_ptr& error) {
  if (error == nullptr) return "no exception";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    return e.what();
  }
}

std::string MessageOf(const std::function<void()>& body) {
  try {
    body();
  } catch (...) {
    return MessageOf(std::current_exception());
  }
  return "no exception";
}

}  // namespace cpumoe
