#include "streams/stream_call.h"

#include <exception>
#include <utility>

#include "base/check.h"
#include "streams/lane.h"
#include "streams/stream_work.h"
#include "streams/transfer_buffer.h"

namespace cpumoe {

struct StreamCall::State {
  State(std::shared_ptr<Bridge> shared, std::shared_ptr<Runtime> runtime,
        std::shared_ptr<const Layer> layer, const Options& options)
      : bridge(std::move(shared)), work(std::move(runtime), std::move(layer), options) {}

  const std::shared_ptr<Bridge> bridge;
  StreamWork work;
};

StreamCall::StreamCall(std::shared_ptr<Bridge> bridge, std::shared_ptr<Runtime> runtime,
                       std::shared_ptr<const Layer> layer, const Options& options)
    : state_(std::make_shared<State>(std::move(bridge), std::move(runtime), std::move(layer),
                                     options)) {}

StreamCall::~StreamCall() {
  if (Wait()) {
    state_->bridge->Abandon(state_->work);
  } else {
    KeepForever(state_);
  }
}

void StreamCall::Submit(StreamHandle stream, const Call::Tensors& tensors) {
  Lane& lane = state_->bridge->LaneOf(stream);
  ThrowError();
  const Call& call = state_->work.call();
  static_cast<void>(call.Args(tensors));  // checks them
  const int64_t hidden = call.layer().config().hidden_size;
  Require(tensors.hidden_stride == hidden, "hidden_stride: expected ", hidden,
          ", rows that follow each other; got ", tensors.hidden_stride);
  lane.Submit(state_->work, tensors);
}

void StreamCall::Sync(StreamHandle stream) {
  state_->bridge->LaneOf(stream).Sync(state_->work);
  ThrowError();
}

void StreamCall::ThrowError() {
  if (const std::exception_ptr error = state_->work.call().TakeError(); error != nullptr) {
    std::rethrow_exception(error);
  }
}

bool StreamCall::Wait() noexcept {
  if (!state_->bridge->Synchronize()) return false;
  state_->work.AwaitJobs();
  return true;
}

std::optional<int64_t> StreamCall::TakeLeftOut() noexcept { return state_->work.TakeLeftOut(); }

int64_t StreamCall::captured_plans() const { return state_->work.captured_plans(); }

}  // namespace cpumoe
