// Calls of a layer whose tensors belong to a stream, e.g. of a GPU.
//
//   stream:   copy inputs | start the job | ... the host's own work ... | wait | copy the output
//   CPU:                    └─ the job: the layer's forward pass ───────┘
//
// Submit queues what is left of the dots, and Sync the rest. Both return at once, and both can be
// captured into a graph. The function that starts the job only puts it into the runtime's queue, so
// it never holds up other functions of the driver.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "engine/call.h"
#include "engine/layer.h"
#include "engine/runtime.h"
#include "streams/bridge.h"
#include "streams/stream_driver.h"
#include "streams/stream_work.h"

namespace cpumoe {

// Any thread may use a StreamCall, several at once as well.
//
// If a job fails, its output is all NaN, and the next function of the layer that is called throws
// std::runtime_error, which says how many tokens the call had. If the driver refuses something, the
// function throws std::runtime_error. A refused Submit leaves nothing of the call behind.
class StreamCall {
 public:
  using Options = StreamWork::Options;

  // Throws std::invalid_argument.
  StreamCall(std::shared_ptr<Bridge> bridge, std::shared_ptr<Runtime> runtime,
             std::shared_ptr<const Layer> layer, const Options& options);
  // Waits like Wait. The mask and the tensors may then be freed. No graph that captured calls of
  // this object may run afterwards.
  ~StreamCall();
  StreamCall(const StreamCall&) = delete;
  StreamCall& operator=(const StreamCall&) = delete;

  // Queues the first half of a call. `tensors` are the device's, and rows of hidden states follow
  // each other. In the stream's order, inputs may change as soon as this has returned. The output
  // must live until Sync's half has run. Calls with more tokens than a buffer holds are made in
  // pieces, and the stream then waits for all but the last ones. A call of this object that was not
  // fetched is forgotten, and so is the oldest one if calls of two other layers were not fetched.
  // Throws std::invalid_argument and std::runtime_error.
  void Submit(StreamHandle stream, const Call::Tensors& tensors);

  // Queues the second half of the call that this object has submitted on `stream`. If the driver
  // refuses, Sync may be called again. Throws std::runtime_error. Errors of jobs do not keep the
  // second half from being queued.
  void Sync(StreamHandle stream);

  // Throws the first error of a job that no function has thrown yet, if there is one.
  void ThrowError();

  // Returns when streams have run what is queued on them and this object's jobs have ended. Returns
  // false if nobody can tell; see Bridge::Synchronize.
  bool Wait() noexcept;

  // See StreamWork.
  std::optional<int64_t> TakeLeftOut() noexcept;

  // See StreamWork.
  int64_t captured_plans() const;

 private:
  struct State;  // what queued operations and jobs use

  const std::shared_ptr<State> state_;
};

}  // namespace cpumoe
