#include "engine/layer.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "base/check.h"
#include "dispatch/variant_loader.h"
#include "moe/pack_experts.h"

namespace cpumoe {

Layer::Layer(std::string isa, const FormatInfo& format, std::unique_ptr<Moe> moe)
    : isa_(std::move(isa)),
      format_(format),
      moe_(std::move(moe)),
      counters_(moe_->config().num_experts) {}

std::shared_ptr<Layer> Layer::Create(const std::string& isa, const std::string& origin,
                                     const std::string& format, const MoeConfig& config,
                                     ScaleType scales) {
  const FormatEntry& entry = FindFormat(LoadVariant(isa, origin), format, scales);
  std::unique_ptr<Moe> moe(entry.create(config));
  return std::shared_ptr<Layer>(new Layer(isa, entry.info, std::move(moe)));
}

void Layer::RequireOwnProcess() const {
  if (!fork_guard_.forked()) return;
  throw std::runtime_error(
      "Layer: a forked process may use its parent's experts, but not pack, mask or evict them; "
      "create a new layer in this process");
}

Layer::Writing Layer::LockForChange() {
  RequireOwnProcess();
  const std::lock_guard turn(turns_mutex_);
  change_waits_.store(true, std::memory_order_relaxed);
  Writing lock(weights_mutex_);
  change_waits_.store(false, std::memory_order_relaxed);
  return lock;
}

Layer::Reading Layer::LockForUse() const {
  if (fork_guard_.forked()) return {};
  if (change_waits_.load(std::memory_order_relaxed)) const std::lock_guard turn(turns_mutex_);
  return Reading(weights_mutex_);
}

size_t Layer::packed_bytes() const {
  const std::vector<uint8_t> has_weights = packed();
  std::vector<uint8_t> copies(config().copies(), 0);
  for (int64_t e = 0; e < config().num_experts; ++e) copies[config().CopyOf(e)] |= has_weights[e];
  return std::accumulate(copies.begin(), copies.end(), int64_t{0}) * moe_->copy_bytes();
}

std::vector<Placement> Layer::placement() const {
  const Reading lock = LockForUse();
  return PlacementOf(moe_->memory());
}

std::vector<uint8_t> Layer::packed() const {
  const Reading lock = LockForUse();
  std::vector<uint8_t> packed(config().num_experts);
  for (int64_t e = 0; e < config().num_experts; ++e) packed[e] = moe_->HasWeights(e) ? 1 : 0;
  return packed;
}

std::array<StoredScales, 3> Layer::Scales(int64_t expert) const {
  const Reading lock = LockForUse();
  return moe_->Scales(expert);
}

void Layer::Pack(Runtime& runtime, std::span<const int64_t> experts,
                 std::span<const ExpertSource> sources) {
  Require(experts.size() == sources.size(), "experts: expected one index for each of the ",
          sources.size(), " sources, got ", experts.size());
  runtime.Execute([&](Node& node) {
    const Writing lock = LockForChange();
    PackExperts(*moe_, experts, sources, node.pool());
  });
}

void Layer::Pack(Runtime& runtime, int64_t first, std::span<const ExpertSource> sources) {
  config().RequireExperts(first, std::ssize(sources));
  std::vector<int64_t> experts(sources.size());
  std::iota(experts.begin(), experts.end(), first);
  Pack(runtime, experts, sources);
}

void Layer::Evict(int64_t expert) {
  const Writing lock = LockForChange();
  moe_->Evict(expert);
}

void Layer::SetMask(const uint8_t* mask) {
  const Writing lock = LockForChange();
  for (int64_t e = 0; e < config().num_experts; ++e) {
    Require((mask != nullptr && mask[e] != 0) || moe_->HasWeights(e), "mask: expert ", e,
            " has no weights and is not masked; pack it first");
  }
  mask_ = mask;
}

void Layer::EvictMasked() {
  const Writing lock = LockForChange();
  if (mask_ == nullptr) return;
  std::vector<uint8_t> used(config().copies(), 0);
  for (int64_t e = 0; e < config().num_experts; ++e) {
    if (mask_[e] == 0) used[config().CopyOf(e)] = 1;
  }
  for (int64_t e = 0; e < config().num_experts; ++e) {
    if (used[config().CopyOf(e)] == 0) moe_->Evict(e);
  }
}

// An expert on its way to a host's memory, step by step.
class Layer::Unpacking {
 public:
  // Throws std::invalid_argument if a shape does not fit, and std::out_of_range.
  Unpacking(const Layer& layer, int64_t expert, std::span<const ExpertDestination> out)
      : layer_(layer), expert_(expert), out_(out), tasks_(layer.moe_->UnpackTasks(out)) {
    layer.config().RequireExperts(expert, 1);
  }

  // Returns whether there are more steps.
  bool Step(Node& node) {
    const int64_t end = std::min(done_ + kStepTasks * node.pool().num_threads(), tasks_);
    const Reading lock = layer_.LockForUse();
    layer_.moe_->Unpack(expert_, out_, done_, end, node.pool());
    done_ = end;
    return done_ < tasks_;
  }

 private:
  // Tasks of about 64 KiB for each thread: a fraction of a millisecond for which calls wait.
  static constexpr int64_t kStepTasks = 32;

  const Layer& layer_;
  const int64_t expert_;
  const std::span<const ExpertDestination> out_;
  const int64_t tasks_;
  int64_t done_ = 0;
};

void Layer::Unpack(Runtime& runtime, int64_t expert, std::span<const ExpertDestination> out) const {
  Unpacking unpacking(*this, expert, out);
  runtime.ExecuteSteps([&](Node& node) { return unpacking.Step(node); });
}

std::shared_ptr<Completion> Layer::SubmitUnpack(std::shared_ptr<const Layer> layer,
                                                Runtime& runtime, int64_t expert,
                                                std::vector<ExpertDestination> out) {
  struct Job {
    std::shared_ptr<const Layer> layer;
    std::vector<ExpertDestination> out;
    Unpacking unpacking;

    Job(std::shared_ptr<const Layer> from, int64_t expert, std::vector<ExpertDestination> to)
        : layer(std::move(from)), out(std::move(to)), unpacking(*layer, expert, out) {}
  };
  auto job = std::make_shared<Job>(std::move(layer), expert, std::move(out));
  return runtime.SubmitSteps([job](Node& node) { return job->unpacking.Step(node); });
}

void Layer::Forward(const ForwardArgs& args, Node& node) const {
  const Reading lock = LockForUse();
  ForwardArgs mine = args;
  mine.counters = &counters_;
  if (mine.routing.mask == nullptr) mine.routing.mask = mask_;
  const auto start = std::chrono::steady_clock::now();
  moe_->Forward(mine, node.pool(), node.workspace());
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
