// One stream: the buffers of its calls, and the calls that wait for their outputs to be fetched.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/call.h"
#include "streams/deferral.h"
#include "streams/stream_driver.h"
#include "streams/stream_work.h"
#include "streams/transfer_buffer.h"

namespace cpumoe {

// What the jobs of all streams hand on: a host may give each layer a stream of its own. Jobs of one
// runtime run in their order.
struct Handover {
  DeferredSum sum;
  std::mutex mutex;                // guards what follows
  TransferBuffer* last = nullptr;  // of the last job
  bool last_defers = false;
  const Runtime* runtime = nullptr;  // that runs the last job
};

// Two buffers serve the calls of a stream in turn, so that one call can be submitted before the
// output of the last one has been fetched. A later call may reuse a buffer at once: in the stream's
// order its copies come after the output was fetched.
//
// Graphs that were captured on the stream have two buffers of their own, because they may run on
// any stream.
class Lane {
 public:
  struct Options {
    int64_t buffer_bytes;    // of each buffer for calls that run
    int64_t captured_bytes;  // of each buffer for calls that are captured
    // Whether streams wait by functions of the CPU even if the driver has another way.
    bool wait_by_function = false;
  };

  // Not during a capture. `running` and `captured` belong to calls of these kinds, and live as long
  // as the lane makes calls and their jobs run. Throws what the driver throws.
  Lane(std::shared_ptr<StreamDriver> driver, StreamHandle stream, const Options& options,
       Handover& running, Handover& captured);

  // Any thread may call. See StreamCall.
  void Submit(StreamWork& work, const Call::Tensors& tensors);
  void Sync(const StreamWork& work);
  // Forgets the calls of `work` that nobody has fetched.
  void Abandon(const StreamWork& work) noexcept;

 private:
  struct Slot {
    std::unique_ptr<TransferBuffer> buffer;
    bool taken = false;      // by a call in `waiting`
    bool unawaited = false;  // a job was started, and the stream does not wait for it yet
    bool lent = false;       // the job may read the buffer after it is done
  };
  struct WaitingCall {
    const StreamWork* work;
    Slot* slot;  // null if the call has no tokens
    TransferLayout::Range from;
    void* output;
  };
  struct SlotPair {
    std::array<Slot, 2> slots;
    size_t next = 0;
    std::vector<WaitingCall> waiting;  // in the order of submission
    std::optional<uint64_t> capture;   // that the members above belong to
    Handover* handover;
  };

  SlotPair MakePair(int64_t bytes, Handover& handover) const;
  // The pair for calls that are made now.
  SlotPair& CurrentPair();
  void SubmitPieces(SlotPair& pair, StreamWork& work, const Call::Tensors& tensors);
  void SubmitPiece(SlotPair& pair, StreamWork& work, const Call::Tensors& tensors, int64_t first,
                   int64_t of);
  Slot& TakeSlot(SlotPair& pair, const StreamWork& work);
  // Makes the stream wait until the job of a slot no longer uses the buffer and the sum.
  void Settle(Slot& slot);
  // Makes the stream wait until a word of a buffer is set.
  void Await(std::atomic<uint32_t>& word);
  // Queues the copy of the output of the first waiting call of `work`. Returns false if there is
  // none.
  bool Fetch(SlotPair& pair, const StreamWork& work);
  static void Forget(SlotPair& pair, const StreamWork& work) noexcept;

  const std::shared_ptr<StreamDriver> driver_;
  const StreamHandle stream_;
  std::mutex mutex_;  // guards the pairs. Never taken by a job or a function on the stream
  SlotPair running_;
  SlotPair captured_;
  const bool waits_for_values_;
};

}  // namespace cpumoe
