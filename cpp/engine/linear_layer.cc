#include "engine/linear_layer.h"

#include "base/check.h"
#include "dispatch/variant_loader.h"

namespace cpumoe {
namespace {

// No host comes near this limit, and products of it and of a layer's sizes do not overflow 64 bits.
constexpr int64_t kMostTokens = int64_t{1} << 31;

}  // namespace

std::shared_ptr<const LinearLayer> LinearLayer::Create(Runtime& runtime, const std::string& isa,
                                                       const std::string& origin,
                                                       const std::string& format,
                                                       const RawMatrix& source, const float* bias,
                                                       const KernelOptions& kernels) {
  const FormatEntry& entry = FindFormat(LoadVariant(isa, origin), format, source.grid.type);
  std::unique_ptr<Linear> linear(entry.create_linear({.out_features = source.rows,
                                                      .in_features = source.columns,
                                                      .has_bias = bias != nullptr,
                                                      .kernels = kernels,
                                                      .nodes = runtime.nodes()}));
  runtime.Execute([&](Node& node) { linear->Pack(source, bias, node.pool()); });
  return std::shared_ptr<const LinearLayer>(new LinearLayer(std::move(linear)));
}

void LinearLayer::Unpack(Runtime& runtime, const MutableRawMatrix& out) const {
  runtime.Execute([&](Node& node) { linear_->Unpack(out, node.pool()); });
}

void LinearCall::Execute(const void* x, int64_t x_stride, int64_t tokens, void* output,
                         int64_t output_stride) const {
  RequireCount(tokens, "tokens");
  if (tokens == 0) return;
  Require(tokens <= kMostTokens, "tokens: expected at most ", kMostTokens, ", got ", tokens);
  RequireStride(x_stride, tokens, ByteSize(options_.input_dtype), "x_stride");
  RequireStride(output_stride, tokens, ByteSize(options_.output_dtype), "output_stride");
  RequireAddress(x, "x");
  RequireAddress(output, "output");
  const LinearArgs args = {.input_dtype = options_.input_dtype,
                           .output_dtype = options_.output_dtype,
                           .fp32_as_bf16 = options_.fp32_as_bf16,
                           .x = x,
                           .x_stride = x_stride,
                           .tokens = tokens,
                           .output = output,
                           .output_stride = output_stride};
  runtime_->Execute(
      [&](Node& node) { layer_->linear().Forward(args, node.pool(), node.workspace()); });
}

}  // namespace cpumoe
