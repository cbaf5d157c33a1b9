// A layer of routed experts: a handle that calls share with the host.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/node.h"
#include "engine/placement.h"
#include "engine/runtime.h"
#include "moe/moe.h"
#include "threading/os_thread.h"

namespace cpumoe {

// Any thread may use a layer. A change (of the packed experts, of the mask) waits for the layer's
// calls on all runtimes, and later calls wait for the change. So a call sees the layer either as it
// was or as it is afterwards. A forked child may compute with its parent's layers on a runtime of
// its own, but not change them.
class Layer {
 public:
  // A layer without weights, on variant `isa`, for scales of the type `scales`. The layer may take
  // other types, too (FormatInfo). `origin` names who asked for the variant, for errors. Throws
  // std::invalid_argument, OutOfMemory, and std::runtime_error if the variant's library is missing
  // or damaged.
  static std::shared_ptr<Layer> Create(const std::string& isa, const std::string& origin,
                                       const std::string& format, const MoeConfig& config,
                                       ScaleType scales = ScaleType::kOwn);

  const std::string& isa() const { return isa_; }
  const FormatInfo& format() const { return format_; }
  const MoeConfig& config() const { return moe_->config(); }
  // The bytes of the layer when all experts are packed.
  size_t nbytes() const { return config().copies() * moe_->copy_bytes(); }
  // The bytes of the experts that are packed now.
  size_t packed_bytes() const;
  // Where the experts lie, a share for each of MoeConfig::nodes.
  std::vector<Placement> placement() const;
  // One byte per expert: whether it has weights.
  std::vector<uint8_t> packed() const;

  // The grids of the scales of an expert's stored gate, up and down, whose types are not kOwn.
  // Throws std::out_of_range, and std::invalid_argument if the expert has no weights.
  std::array<StoredScales, 3> Scales(int64_t expert) const;

  // Packs sources[i] as expert experts[i], for its replicas (MoeConfig::copy_of) as well. After an
  // exception some of these experts have no weights.
  void Pack(Runtime& runtime, std::span<const int64_t> experts,
            std::span<const ExpertSource> sources);
  // Packs sources[i] as expert first + i.
  void Pack(Runtime& runtime, int64_t first, std::span<const ExpertSource> sources);

  // Gives the memory of an expert's weights back to the system. Calls that need the expert, or a
  // replica of it, fail until it is packed again. Throws std::out_of_range and std::system_error.
  void Evict(int64_t expert);

  // Names the experts that calls skip, unless a call has a mask of its own (RoutingInput::mask).
  // `mask` is read whenever a call runs. It must live until another one is set, or as long as there
  // are calls. Throws std::invalid_argument if an expert that is not masked has no weights, and
  // then changes nothing.
  void SetMask(const uint8_t* mask);
  // Evicts every expert that the layer's mask skips, unless a replica of it is not skipped.
  void EvictMasked();
  // Throws std::runtime_error in a forked child.
  void RequireOwnProcess() const;

  // Writes a packed expert, or shards of it, to `out` in its checkpoint's form. Calls that wait run
  // in between. Throws std::out_of_range, and std::invalid_argument if a shape does not fit or the
  // expert has no weights. If the expert is evicted meanwhile, a part of `out` has been written.
  void Unpack(Runtime& runtime, int64_t expert, std::span<const ExpertDestination> out) const;
  // Lets the driver unpack. The memory of `out`, and the names, must live until the completion is
  // done. Throws at once if there is no such expert or a shape does not fit.
  static std::shared_ptr<Completion> SubmitUnpack(std::shared_ptr<const Layer> layer,
                                                  Runtime& runtime, int64_t expert,
                                                  std::vector<ExpertDestination> out);

  // Sums over all calls since the layer was made.
  struct Statistics {
    int64_t calls;                       // that have succeeded
    double seconds;                      // that these calls took, waiting for their turn excluded
    int64_t bytes_read;                  // of weights, see LayerCounters
    std::vector<int64_t> expert_tokens;  // [num_experts], tokens that each expert has computed
  };
  Statistics statistics() const;

  // The forward call itself, for a body that a runtime runs on `node`. Counts it, so that
  // `args.counters` has no effect.
  void Forward(const ForwardArgs& args, Node& node) const;

 private:
  class Unpacking;

  Layer(std::string isa, const FormatInfo& format, std::unique_ptr<Moe> moe);

  using Writing = std::unique_lock<std::shared_mutex>;
  using Reading = std::shared_lock<std::shared_mutex>;

  // Locks the layer for a change. Throws std::runtime_error in a forked child.
  Writing LockForChange();
  // Locks the layer against changes. A forked child gets no lock. In the child nothing changes
  // the layer, and a thread that exists in the parent alone may own the mutex.
  Reading LockForUse() const;

  const ForkGuard fork_guard_;
  const std::string isa_;
  const FormatInfo format_;
  const std::unique_ptr<Moe> moe_;
  mutable LayerCounters counters_;
  mutable std::atomic<int64_t> calls_{0};
  mutable std::atomic<int64_t> nanoseconds_{0};
  const uint8_t* mask_ = nullptr;
  // Locked in this order, after the runtime's mutex. A change holds turns_mutex_ while it waits for
  // calls, and later calls wait for turns_mutex_. A shared mutex alone may let a change wait for as
  // long as calls overlap.
  std::atomic<bool> change_waits_{false};
  mutable std::mutex turns_mutex_;
  mutable std::shared_mutex weights_mutex_;
};

}  // namespace cpumoe
