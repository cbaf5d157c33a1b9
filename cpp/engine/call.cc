#include "engine/call.h"

#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "base/check.h"

namespace cpumoe {
namespace {

void RequireAddress(const void* address, const char* name) {
  Require(address != nullptr, name, ": expected an address, got a null pointer");
}

// Copies what a call reads, and lets `args` point to the copy. Rows of the copy are dense.
std::shared_ptr<std::byte[]> CopyInputs(ForwardArgs& args, int64_t hidden_size) {
  const auto padded = [](int64_t bytes) {
    return RoundUp(bytes, static_cast<int64_t>(AlignedBuffer::kCacheLine));
  };
  const int64_t row = hidden_size * ByteSize(args.input_dtype);
  const int64_t pairs = args.tokens * args.routing.top_k;
  const int64_t id_bytes = pairs * (args.routing.ids_are_64_bit ? 8 : 4);
  const int64_t ids_offset = padded(args.tokens * row);
  const int64_t weights_offset = ids_offset + padded(id_bytes);
  const int64_t weight_bytes = pairs * static_cast<int64_t>(sizeof(float));
  auto copy = std::make_shared_for_overwrite<std::byte[]>(weights_offset + weight_bytes);
  const auto* rows = static_cast<const std::byte*>(args.hidden_states);
  const int64_t stride = args.hidden_stride * ByteSize(args.input_dtype);
  if (stride == row && args.tokens > 0) {
    std::memcpy(copy.get(), rows, args.tokens * row);
  } else {
    for (int64_t t = 0; t < args.tokens; ++t) {
      std::memcpy(copy.get() + t * row, rows + t * stride, row);
    }
  }
  if (pairs > 0) {
    std::memcpy(copy.get() + ids_offset, args.routing.ids, id_bytes);
    std::memcpy(copy.get() + weights_offset, args.routing.weights, weight_bytes);
  }
  args.hidden_states = copy.get();
  args.hidden_stride = hidden_size;
  args.routing.ids = copy.get() + ids_offset;
  args.routing.weights = reinterpret_cast<const float*>(copy.get() + weights_offset);
  return copy;
}

}  // namespace

Call::Call(std::shared_ptr<Runtime> runtime, std::shared_ptr<const Layer> layer,
           const Options& options)
    : runtime_(std::move(runtime)), layer_(std::move(layer)), options_(options) {
  Require(options.top_k >= 0, "top_k: expected 0 or more, got ", options.top_k);
  Require(!options.accumulate || options.output_dtype == DType::kFp32,
          "accumulate: results can be added onto an fp32 output only");
  bound_ = Args({});
}

ForwardArgs Call::Args(const Tensors& tensors) const {
  Require(tensors.tokens >= 0, "tokens: expected 0 or more, got ", tensors.tokens);
  if (tensors.tokens > 0) {
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

void Call::Execute(const Tensors& tensors) const {
  const ForwardArgs args = Args(tensors);
  runtime_->Execute([&](Node& node) { layer_->Forward(args, node); });
}

std::shared_ptr<Completion> Call::Submit(const Tensors& tensors, bool copy_inputs) const {
  ForwardArgs args = Args(tensors);
  std::shared_ptr<std::byte[]> copy;
  if (copy_inputs) copy = CopyInputs(args, layer_->config().hidden_size);
  return runtime_->Submit(
      [layer = layer_, args, copy = std::move(copy)](Node& node) { layer->Forward(args, node); });
}

void Call::Bind(const Tensors& tensors) { bound_ = Args(tensors); }

bool Call::Run() noexcept {
  try {
    runtime_->Execute([&](Node& node) { layer_->Forward(bound_, node); });
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
