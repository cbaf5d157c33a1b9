// A layer's calls as a stream and the runtime's driver see them: a function on the CPU starts a
// job, and the job ends by telling the stream that the output is complete.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/call.h"
#include "streams/deferral.h"
#include "streams/stream_driver.h"
#include "streams/transfer_buffer.h"

namespace cpumoe {

class StreamWork {
 public:
  struct Options {
    // `accumulate` must be false. Captured calls read `mask` whenever they run. Other calls use
    // the mask as it is when they are submitted.
    Call::Options call;
    // Kept as long as a job may read the mask. May be null.
    std::shared_ptr<const void> mask_owner = nullptr;
    // Whether ids that name no expert are skipped. Otherwise only -1 and num_experts are, and other
    // ids are an error.
    bool skip_unknown_ids = false;
    // How many experts of a token may be computed later (deferral.h).
    int64_t deferred_experts = 0;
    // The layer's place in its model. Only layers of greater numbers add what it defers.
    int64_t layer_index = 0;
  };

  // Throws std::invalid_argument.
  StreamWork(std::shared_ptr<Runtime> runtime, std::shared_ptr<const Layer> layer,
             const Options& options);
  // All jobs have ended, and no graph with a captured call runs again.
  ~StreamWork();

  bool defers() const { return options_.deferred_experts > 0; }
  const Runtime& runtime() const { return call_.runtime(); }
  Call& call() { return call_; }
  const Call& call() const { return call_; }

  // A job: some or all tokens of a call, whose inputs lie in `buffer` as `layout` says.
  struct Piece {
    TransferBuffer& buffer;
    TransferLayout layout;
    int64_t first;  // token
    int64_t tokens;
    int64_t of;        // tokens of the whole call
    DeferredSum& sum;  // of the bridge
  };
  // Queues the function that starts the job. Throws what the driver throws.
  void Launch(StreamDriver& driver, StreamHandle stream, bool captured, const Piece& piece);

  // How many functions were queued under captures. A graph may run them again and again, so what
  // they need lives as long as this object.
  int64_t captured_plans() const;

  // The layer whose deferred experts a job has left out, because they did not fit its call. Each is
  // returned once; none: nullopt.
  std::optional<int64_t> TakeLeftOut() noexcept;

  // Returns when the jobs that have been started have ended.
  void AwaitJobs() noexcept { AwaitValue(jobs_, 0); }

 private:
  struct Plan;
  static constexpr int64_t kNone = -1;

  static void Start(void* plan) noexcept;
  void Run(Plan* plan, Node& node) noexcept;
  // Returns whether something is left for ComputeLater.
  bool Compute(const Plan& plan, Node& node);
  // Adds the forward pass to the sum of deferred experts, and writes the total to the output.
  void AddSum(ForwardArgs args, const Piece& piece, Node& node);
  void ComputeLater(const Plan& plan, Node& node) noexcept;
  void Fail(const Piece& piece, const std::exception_ptr& error) noexcept;
  // Keeps an error of a job of `tokens` tokens, whose `output` is NaN.
  void Keep(const std::exception_ptr& error, int64_t tokens, const char* output) noexcept;
  void End(Plan* plan) noexcept;
  // Changes ids of experts that are not computed now to -1. Returns whether any are computed later.
  template <class Id>
  bool PrepareIds(Id* ids, const float* weights, const Piece& piece);
  ForwardArgs Args(const Plan& plan) const;
  bool Defers(const Piece& piece) const;

  Call call_;
  const Options options_;
  ExpertSplit split_;              // of the job that is running
  std::atomic<uint32_t> jobs_{0};  // that have been started and have not ended
  std::atomic<int64_t> left_out_{kNone};
  // Plans live here, because a device that fails runs no function that is queued on it.
  mutable std::mutex plans_mutex_;  // guards both lists; never taken by a job
  std::list<Plan> captured_;        // as long as this object, because graphs may run them again
  std::list<Plan> queued_;          // until they have ended and another one is queued
};

}  // namespace cpumoe
