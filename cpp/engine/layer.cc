#include "engine/layer.h"

#include <chrono>
#include <stdexcept>
#include <utility>

#include "dispatch/variant_loader.h"
#include "moe/pack_experts.h"

namespace cpumoe {

Layer::Layer(std::string isa, const FormatInfo& format, std::unique_ptr<Moe> moe)
    : isa_(std::move(isa)),
      format_(format),
      moe_(std::move(moe)),
      counters_(moe_->config().num_experts) {}

std::shared_ptr<Layer> Layer::Create(const std::string& isa, const std::string& origin,
                                     const std::string& format, const MoeConfig& config) {
  const FormatEntry& entry = FindFormat(LoadVariant(isa, origin), format);
  std::unique_ptr<Moe> moe(entry.create(config));
  return std::shared_ptr<Layer>(new Layer(isa, entry.info, std::move(moe)));
}

Layer::Writing Layer::LockForChange() {
  if (fork_guard_.forked()) {
    throw std::runtime_error(
        "Layer: a forked process may use its parent's experts, but not pack or evict them; create "
        "a new layer in this process");
  }
  return Writing(weights_mutex_);
}

Layer::Reading Layer::LockForUse() const {
  return fork_guard_.forked() ? Reading() : Reading(weights_mutex_);
}

void Layer::Pack(Runtime& runtime, int64_t first, std::span<const ExpertSource> sources) {
  runtime.Execute([&](Node& node) {
    const Writing lock = LockForChange();
    PackExperts(*moe_, first, sources, node.pool());
  });
}

void Layer::Evict(int64_t expert) {
  const Writing lock = LockForChange();
  moe_->Evict(expert);
}

void Layer::Unpack(Runtime& runtime, int64_t expert, const ExpertDestination& out) const {
  runtime.Execute([&](Node& node) {
    const Reading lock = LockForUse();
    moe_->Unpack(expert, out, node.pool());
  });
}

void Layer::Forward(const ForwardArgs& args, Node& node) const {
  const Reading lock = LockForUse();
  ForwardArgs counted = args;
  counted.counters = &counters_;
  const auto start = std::chrono::steady_clock::now();
  moe_->Forward(counted, node.pool(), node.workspace());
  const std::chrono::nanoseconds taken = std::chrono::steady_clock::now() - start;
  calls_.fetch_add(1, std::memory_order_relaxed);
  nanoseconds_.fetch_add(taken.count(), std::memory_order_relaxed);
}

Layer::Statistics Layer::statistics() const {
  Statistics sums = {.calls = calls_.load(std::memory_order_relaxed),
                     .seconds = 1e-9 * static_cast<double>(nanoseconds_.load()),
                     .bytes_read = counters_.bytes_read.load(std::memory_order_relaxed),
                     .expert_tokens = {}};
  for (const std::atomic<int64_t>& tokens : counters_.expert_tokens) {
    sums.expert_tokens.push_back(tokens.load(std::memory_order_relaxed));
  }
  return sums;
}

}  // namespace cpumoe
