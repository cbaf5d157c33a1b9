#include "engine/call.h"

#include <utility>

#include "base/check.h"
#include "base/float_types.h"
#include "engine/copy_inputs.h"

namespace cpumoe {
namespace {

// No host comes near these limits, and products of them and of a layer's sizes do not overflow 64
// bits.
constexpr int64_t kMostTokens = int64_t{1} << 31;
constexpr int64_t kMostTopK = int64_t{1} << 16;

}  // namespace

Call::Call(std::shared_ptr<Runtime> runtime, std::shared_ptr<const Layer> layer,
           const Options& options)
    : runtime_(std::move(runtime)), layer_(std::move(layer)), options_(options) {
  RequireCount(options.top_k, "top_k");
  Require(options.top_k <= kMostTopK, "top_k: expected at most ", kMostTopK, ", got ",
          options.top_k);
  Require(!options.accumulate || options.output_dtype == DType::kFp32,
          "accumulate: results can be added onto an fp32 output only");
  bound_ = Args({});
}

ForwardArgs Call::Args(const Tensors& tensors) const {
  RequireCount(tensors.tokens, "tokens");
  if (tensors.tokens > 0) {
    Require(tensors.tokens <= kMostTokens, "tokens: expected at most ", kMostTokens, ", got ",
            tensors.tokens);
    RequireStride(tensors.hidden_stride, tensors.tokens, ByteSize(options_.input_dtype),
                  "hidden_stride");
    RequireAddress(tensors.hidden_states, "hidden_states");
    RequireAddress(tensors.output, "output");
  }
  if (tensors.tokens > 0 && options_.top_k > 0) {
    RequireAddress(tensors.ids, "ids");
    RequireAddress(tensors.weights, "weights");
  }
  return {.routing = {.ids = tensors.ids,
                      .ids_are_64_bit = options_.ids_are_64_bit,
                      .weights = tensors.weights,
                      .mask = options_.mask,
                      .top_k = options_.top_k},
          .input_dtype = options_.input_dtype,
          .output_dtype = options_.output_dtype,
          .accumulate = options_.accumulate,
          .fp32_as_bf16 = options_.fp32_as_bf16,
          .hidden_states = tensors.hidden_states,
          .hidden_stride = tensors.hidden_stride,
          .tokens = tensors.tokens,
          .output = tensors.output};
}

void Call::ExecuteChecked(const ForwardArgs& args) const {
  runtime_->Execute([&](Node& node) { layer_->Forward(args, node); });
}

std::shared_ptr<Completion> Call::SubmitChecked(ForwardArgs args, bool copy_inputs) const {
  std::shared_ptr<const void> copy;
  if (copy_inputs) copy = CopyInputs(args, layer_->config().hidden_size);
  return runtime_->Submit(
      [layer = layer_, args, copy = std::move(copy)](Node& node) { layer->Forward(args, node); });
}

void Call::Bind(const Tensors& tensors) { bound_ = Args(tensors); }

bool Call::Run() noexcept {
  try {
    ExecuteBound();
    return true;
  } catch (...) {
    KeepError(std::current_exception());
    return false;
  }
}

void Call::KeepError(std::exception_ptr error) noexcept {
  ErrorState none = ErrorState::kNone;
  if (!error_state_.compare_exchange_strong(none, ErrorState::kBusy)) return;
  error_ = std::move(error);
  error_state_.store(ErrorState::kKept);
}

std::exception_ptr Call::TakeError() noexcept {
  ErrorState kept = ErrorState::kKept;
  if (!error_state_.compare_exchange_strong(kept, ErrorState::kBusy)) return nullptr;
  std::exception_ptr error = std::exchange(error_, nullptr);
  error_state_.store(ErrorState::kNone);
  return error;
}

}  // namespace cpumoe
