#include "engine/attention_call.h"

#include <cmath>
#include <utility>

#include "base/check.h"
#include "dispatch/variant_loader.h"

namespace cpumoe {
namespace {

// No host comes near these limits. Products of sizes within them do not overflow 64 bits.
constexpr int64_t kMostRows = int64_t{1} << 31;
constexpr int64_t kMostSize = int64_t{1} << 16;

void RequireSize(int64_t size, int64_t least, int64_t most, const char* name) {
  Require(size >= least && size <= most, name, ": expected ", least, " to ", most, ", got ", size);
}

void RequireSizes(const AttentionArgs& args) {
  RequireSize(args.batch, 0, kMostSize, "batch");
  RequireSize(args.kv_heads, 1, kMostSize, "kv_heads");
  RequireSize(args.heads, 1, kMostSize, "heads");
  Require(args.heads % args.kv_heads == 0, "heads: expected a multiple of kv_heads (",
          args.kv_heads, "), got ", args.heads);
  RequireSize(args.queries, 0, kMostRows, "queries");
  RequireSize(args.keys, 0, kMostRows, "keys");
  RequireSize(args.head_size, 1, kMostSize, "head_size");
  RequireSize(args.value_size, 1, kMostSize, "value_size");
  RequireSize(args.window, 0, kMostRows, "window");
  Require(args.window == 0 || args.causal, "window: expected 0 without causal, got ", args.window);
  Require(std::isfinite(args.scale), "scale: expected a finite number, got ", args.scale);
  Require(std::isfinite(args.softcap) && args.softcap >= 0.0f,
          "softcap: expected 0 or a positive number, got ", args.softcap);
}

}  // namespace

AttentionCall::AttentionCall(std::shared_ptr<Runtime> runtime, const std::string& isa,
                             const std::string& origin)
    : runtime_(std::move(runtime)), variant_(LoadVariant(isa, origin)) {}

void AttentionCall::Execute(const AttentionArgs& args) const {
  RequireSizes(args);
  if (args.batch == 0 || args.queries == 0) return;
  RequireAddress(args.q.data, "q");
  RequireAddress(args.output.data, "output");
  if (args.keys > 0) {
    RequireAddress(args.k.data, "k");
    RequireAddress(args.v.data, "v");
    if (args.mask_type != MaskType::kNone) RequireAddress(args.mask.data, "mask");
  }
  runtime_->Execute([&](Node& node) { variant_.attend(args, node.pool(), node.workspace()); });
}

}  // namespace cpumoe
