#include "streams/stream_work.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/check.h"
#include "threading/futex.h"

namespace cpumoe {

// A job and its fate.
struct StreamWork::Plan {
  StreamWork& work;
  Piece piece;
  bool captured;              // graphs have its address
  std::vector<uint8_t> mask;  // the job's own; empty: the layer's mask applies
  std::atomic<bool> ended = false;
};

StreamWork::StreamWork(std::shared_ptr<Runtime> runtime, std::shared_ptr<const Layer> layer,
                       const Options& options)
    : call_(std::move(runtime), std::move(layer), options.call), options_(options) {
  Require(!options.call.accumulate, "accumulate: a call on a stream overwrites its output");
  Require(options.deferred_experts >= 0 && options.deferred_experts <= options.call.top_k,
          "deferred_experts: expected 0 to top_k (", options.call.top_k, "), got ",
          options.deferred_experts);
  Require(options.layer_index >= 0, "layer_index: expected 0 or more, got ", options.layer_index);
}

StreamWork::~StreamWork() = default;

void StreamWork::Launch(StreamDriver& driver, StreamHandle stream, bool captured,
                        const Piece& piece) {
  const uint8_t* const mask = options_.call.mask;
  const int64_t masked = mask == nullptr ? 0 : call_.layer().config().num_experts;
  std::list<Plan> plan;
  plan.emplace_back(*this, piece, captured, std::vector<uint8_t>(mask, mask + masked));
  const auto place = plan.begin();
  std::list<Plan>& plans = captured ? captured_ : queued_;
  {
    const std::lock_guard lock(plans_mutex_);
    while (!queued_.empty() && queued_.front().ended) queued_.pop_front();
    plans.splice(plans.end(), plan);
  }
  try {
    driver.Launch(stream, &Start, &*place);
  } catch (...) {
    const std::lock_guard lock(plans_mutex_);
    plans.erase(place);
    throw;
  }
}

std::optional<int64_t> StreamWork::TakeLeftOut() noexcept {
  const int64_t layer = left_out_.exchange(kNone);
  return layer == kNone ? std::nullopt : std::optional(layer);
}

int64_t StreamWork::captured_plans() const {
  const std::lock_guard lock(plans_mutex_);
  return std::ssize(captured_);
}

void StreamWork::Start(void* data) noexcept {
  Plan* const plan = static_cast<Plan*>(data);
  StreamWork& work = plan->work;
  work.jobs_.fetch_add(1);
  // Reset here, in the stream's order, so that each run of a graph starts afresh.
  plan->piece.buffer.done().store(TransferBuffer::kUnset);
  if (work.Defers(plan->piece)) plan->piece.buffer.idle().store(TransferBuffer::kUnset);
  std::exception_ptr error;
  try {
    work.call_.runtime().Submit([plan](Node& node) { plan->work.Run(plan, node); });
    return;
  } catch (...) {
    error = std::current_exception();
  }
  work.Fail(plan->piece, error);
  SetValue(plan->piece.buffer.done(), TransferBuffer::kSet);
  work.End(plan);
}

void StreamWork::Run(Plan* plan, Node& node) noexcept {
  const Piece& piece = plan->piece;
  if (plan->captured) std::copy_n(options_.call.mask, plan->mask.size(), plan->mask.begin());
  bool later = false;
  try {
    later = Compute(*plan, node);
  } catch (...) {
    piece.sum.Drop();
    Fail(piece, std::current_exception());
  }
  // From here on the stream may use the buffer for another job, unless this one is not idle.
  SetValue(piece.buffer.done(), TransferBuffer::kSet);
  if (later) ComputeLater(*plan, node);
  End(plan);
}

void StreamWork::Fail(const Piece& piece, const std::exception_ptr& error) noexcept {
  // All bits set is NaN in every dtype. Whoever reads the output notices.
  std::memset(piece.buffer.At(piece.layout.output), 0xff, piece.layout.output.bytes);
  Keep(error, piece.of, "its output");
}

void StreamWork::Keep(const std::exception_ptr& error, int64_t tokens,
                      const char* output) noexcept {
  try {
    std::string why = "an unknown error";
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& exception) {
      why = exception.what();
    } catch (...) {  // NOLINT(bugprone-empty-catch)
    }
    throw std::runtime_error(
        Message("a call of ", tokens, " tokens has failed, and ", output, " is NaN: ", why));
  } catch (...) {
    call_.KeepError(std::current_exception());
  }
}

void StreamWork::End(Plan* plan) noexcept {
  if (Defers(plan->piece)) SetValue(plan->piece.buffer.idle(), TransferBuffer::kSet);
  if (!plan->captured) plan->ended = true;  // from here on, Launch may delete it
  // Once the count is 0, this object may be gone. Waking uses the address alone.
  std::atomic<uint32_t>& jobs = jobs_;
  jobs.fetch_sub(1);
  FutexWake(jobs, std::numeric_limits<int>::max());
}

// A call that is made in pieces defers nothing.
bool StreamWork::Defers(const Piece& piece) const { return defers() && piece.tokens == piece.of; }

ForwardArgs StreamWork::Args(const Plan& plan) const {
  const Piece& piece = plan.piece;
  const auto at = [&](const TransferLayout::Range& range) { return piece.buffer.At(range); };
  ForwardArgs args =
      call_.Args({.hidden_states = at(piece.layout.hidden_states),
                  .hidden_stride = call_.layer().config().hidden_size,
                  .tokens = piece.tokens,
                  .ids = at(piece.layout.ids),
                  .weights = reinterpret_cast<const float*>(at(piece.layout.weights)),
                  .output = at(piece.layout.output)});
  args.routing.mask = plan.mask.empty() ? nullptr : plan.mask.data();
  return args;
}

template <class Id>
bool StreamWork::PrepareIds(Id* ids, const float* weights, const Piece& piece) {
  const int64_t top_k = call_.options().top_k;
  const int64_t num_experts = call_.layer().config().num_experts;
  if (options_.skip_unknown_ids) {
    for (Id* id = ids; id < ids + piece.tokens * top_k; ++id) {
      if (*id < 0 || *id >= num_experts) *id = -1;
    }
  }
  return Defers(piece) &&
         split_.Move(ids, weights, piece.tokens, top_k, options_.deferred_experts, num_experts);
}

bool StreamWork::Compute(const Plan& plan, Node& node) {
  const Piece& piece = plan.piece;
  const int64_t elements = piece.of * call_.layer().config().hidden_size;
  ForwardArgs args = Args(plan);
  std::byte* const ids = piece.buffer.At(piece.layout.ids);
  const float* const weights = args.routing.weights;
  const bool later = args.routing.ids_are_64_bit
                         ? PrepareIds(reinterpret_cast<int64_t*>(ids), weights, piece)
                         : PrepareIds(reinterpret_cast<int32_t*>(ids), weights, piece);
  if (!piece.sum.Fits(options_.layer_index, elements)) {
    if (!piece.sum.empty()) left_out_ = piece.sum.layer();
    piece.sum.Drop();
    call_.layer().Forward(args, node);
  } else {
    AddSum(args, piece, node);
  }
  if (later) piece.sum.Make(options_.layer_index, elements);
  return later;
}

void StreamWork::AddSum(ForwardArgs args, const Piece& piece, Node& node) {
  const MoeConfig& config = call_.layer().config();
  float* const sum = piece.sum.data() + piece.first * config.hidden_size;
  const DType output_dtype = std::exchange(args.output_dtype, DType::kFp32);
  void* const output = std::exchange(args.output, sum);
  args.accumulate = true;
  call_.layer().Forward(args, node);
  ConvertTo(output_dtype, sum, piece.tokens * config.hidden_size, output, node.pool());
  if (piece.first + piece.tokens == piece.of) piece.sum.Drop();
}

void StreamWork::ComputeLater(const Plan& plan, Node& node) noexcept {
  float* const sum = plan.piece.sum.data();
  try {
    ForwardArgs args = Args(plan);
    args.routing.ids = split_.later_ids();
    args.output_dtype = DType::kFp32;
    args.output = sum;
    call_.layer().Forward(args, node);
  } catch (...) {
    const int64_t elements = plan.piece.tokens * call_.layer().config().hidden_size;
    std::fill_n(sum, elements, std::numeric_limits<float>::quiet_NaN());
    Keep(std::current_exception(), plan.piece.tokens, "the next layer's output");
  }
}

}  // namespace cpumoe
