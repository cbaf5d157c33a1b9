#include "moe/packed_experts.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <new>
#include <span>

#include "base/bits.h"
#include "base/check.h"

namespace cpumoe {
namespace {

// No model comes near these limits, and products of them do not overflow 64 bits.
constexpr int64_t kMaxExperts = int64_t{1} << 16;
constexpr int64_t kMaxSize = int64_t{1} << 21;

void CheckSize(const TileFormat& format, int64_t size, const char* name) {
  Require(size > 0, name, " must be positive, got ", size);
  format.RequireWholeBytes(size, name);
  Require(size <= kMaxSize, name, " must be at most ", kMaxSize, ", got ", size);
}

const MoeConfig& Checked(const TileFormat& format, const MoeConfig& c) {
  Require(c.num_experts > 0, "num_experts must be positive, got ", c.num_experts);
  CheckSize(format, c.hidden_size, "hidden_size");
  CheckSize(format, c.intermediate_size, "intermediate_size");
  Require(c.num_experts <= kMaxExperts, "num_experts must be at most ", kMaxExperts, ", got ",
          c.num_experts);
  Require(c.copy_of.empty() || std::ssize(c.copy_of) == c.num_experts, "copy_of must have no or ",
          c.num_experts, " elements, got ", c.copy_of.size());
  for (const int32_t copy : c.copy_of) {
    Require(copy >= 0 && copy < c.num_experts, "copy_of must have elements in [0, ", c.num_experts,
            "), got ", copy);
  }
  Require(c.nodes.size() <= kMaxMemoryNodes, "nodes must be at most ", kMaxMemoryNodes, ", got ",
          c.nodes.size());
  return c;
}

}  // namespace

PackedExperts::PackedExperts(const TileFormat& format, const MoeConfig& config)
    : format_(&format),
      config_(Checked(format, config)),
      gate_up_(format.shape, config.intermediate_size, config.hidden_size,
               config.glu.gated ? 2 : 1),
      down_(format.shape, config.hidden_size, config.intermediate_size),
      gate_up_shares_(gate_up_.tiles(), config.nodes),
      down_shares_(down_.tiles(), config.nodes),
      shares_(Allocate()),
      biases_(config.has_bias ? config.copies() * BiasSize() : 0),
      scales_(config.copies()),
      stored_(config.copies()),
      has_weights_(config.copies(), 0) {}

std::vector<PackedExperts::Share> PackedExperts::Allocate() const {
  const int64_t copies = config_.copies();
  std::vector<Share> shares;
  try {
    for (int n = 0; n < gate_up_shares_.count(); ++n) {
      const int64_t bytes = Shared() * gate_up_shares_.tiles(n) * gate_up_.TileBytes() +
                            down_shares_.tiles(n) * down_.TileBytes();
      const int node = config_.nodes.empty() ? kAnyNode : config_.nodes[n].id;
      shares.push_back({bytes, AlignedBuffer(static_cast<size_t>(copies * bytes), node)});
    }
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(Message("cannot allocate ", (copies * PackedBytes()) >> 20, " MiB for ",
                              copies, " experts of ", PackedBytes() >> 20, " MiB each"));
  }
  return shares;
}

std::vector<MemoryShare> PackedExperts::memory() const {
  std::vector<MemoryShare> memory;
  for (const Share& share : shares_) memory.push_back(share.packed.share());
  return memory;
}

void PackedExperts::RequireFits(int64_t expert, const ExpertSource& source) const {
  config_.RequireExperts(expert, 1);
  if (gated()) {
    source.gate.RequireShape(gate_up_.rows(), gate_up_.columns());
  } else {
    Require(source.gate.codes == nullptr, source.gate.name,
            ": expected none, because the layer's experts have no gate projection");
  }
  source.up.RequireShape(gate_up_.rows(), gate_up_.columns());
  source.down.RequireShape(down_.rows(), down_.columns());
  if (gated()) format_->require_scales(source.gate);
  format_->require_scales(source.up);
  format_->require_scales(source.down);
  const bool biased = source.up_bias != nullptr;
  Require(biased == config_.has_bias && (biased && gated()) == (source.gate_bias != nullptr) &&
              biased == (source.down_bias != nullptr),
          "expert ", expert, ": ",
          !config_.has_bias ? "no biases"
          : gated()         ? "three biases"
                            : "biases of up and down",
          " expected, as the layer's has_bias says");
}

void PackedExperts::Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) {
  RequireFits(expert, source);
  const RawMatrix* const matrices[] = {&source.gate, &source.up, &source.down};
  const int64_t copy = config_.CopyOf(expert);
  has_weights_[copy] = 0;
  std::vector<ScaleRange> ranges(pool.num_threads());
  ForEachTile(pool, [&](Projection p, int64_t tile, int thread) {
    const RawMatrix& matrix = *matrices[static_cast<int>(p)];
    std::byte* packed = Matrix(copy, p, shares(p).Of(tile));
    ranges[thread].Merge(format_->pack(layout(p), matrix, tile, packed));
  });
  for (const ScaleRange& range : ranges) ranges[0].Merge(range);
  scales_[copy] = ranges[0];
  for (int p = First(); p < kProjections; ++p) stored_[copy][p] = format_->ScalesOf(*matrices[p]);
  if (config_.has_bias) {
    float* bias = biases_.data() + copy * BiasSize();
    if (gated()) std::copy_n(source.gate_bias, config_.intermediate_size, bias);
    bias += config_.intermediate_size;
    bias = std::copy_n(source.up_bias, config_.intermediate_size, bias);
    std::copy_n(source.down_bias, config_.hidden_size, bias);
  }
  has_weights_[copy] = 1;
}

void PackedExperts::Evict(int64_t expert) {
  config_.RequireExperts(expert, 1);
  const int64_t copy = config_.CopyOf(expert);
  has_weights_[copy] = 0;
  for (const Share& share : shares_) {
    share.packed.GiveBack(copy * share.copy_bytes, share.copy_bytes);
  }
}

// Calls body(projection, tile, thread) for every tile, on the tile's node if memory does not come
// from there anyway. A task is a run of tiles, about half a huge page of them. If threads wrote
// neighbouring tiles for the first time, each of them would clear the same page.
template <class Body>
void PackedExperts::ForEachTile(ThreadPool& pool, Body&& body) const {
  constexpr auto kRunBytes = static_cast<int64_t>(AlignedBuffer::kHugePage / 2);
  const int64_t pairs = std::max<int64_t>(kRunBytes / (Shared() * gate_up_.TileBytes()), 1);
  const int64_t downs = std::max<int64_t>(kRunBytes / down_.TileBytes(), 1);
  std::array<int64_t, kMaxMemoryNodes> tasks;
  bool bound = true;
  for (size_t n = 0; n < shares_.size(); ++n) {
    tasks[n] = CeilDiv(gate_up_shares_.tiles(n), pairs) + CeilDiv(down_shares_.tiles(n), downs);
    bound = bound && (shares_[n].packed.bound() || tasks[n] == 0);
  }
  pool.ForNodes(
      std::span(tasks.data(), shares_.size()),
      [&](int node, int64_t task, int thread) {
        const int64_t gate_up_tasks = CeilDiv(gate_up_shares_.tiles(node), pairs);
        if (task < gate_up_tasks) {
          const int64_t first = gate_up_shares_.begin(node) + task * pairs;
          const int64_t end = std::min(first + pairs, gate_up_shares_.end(node));
          for (int64_t t = first; t < end; ++t) {
            if (gated()) body(Projection::kGate, t, thread);
            body(Projection::kUp, t, thread);
          }
        } else {
          const int64_t first = down_shares_.begin(node) + (task - gate_up_tasks) * downs;
          const int64_t end = std::min(first + downs, down_shares_.end(node));
          for (int64_t t = first; t < end; ++t) body(Projection::kDown, t, thread);
        }
      },
      bound ? ThreadPool::WhenDone::kHelp : ThreadPool::WhenDone::kWait);
}

}  // namespace cpumoe
