#include "streams/lane.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "base/check.h"

namespace cpumoe {
namespace {

const std::byte* Skip(const void* address, int64_t bytes) {
  return static_cast<const std::byte*>(address) + bytes;
}

// A host function that waits until a word of a buffer is set.
void AwaitSet(void* word) noexcept {
  AwaitValue(*static_cast<std::atomic<uint32_t>*>(word), TransferBuffer::kSet);
}

}  // namespace

Lane::Lane(std::shared_ptr<StreamDriver> driver, StreamHandle stream, const Options& options,
           Handover& running, Handover& captured)
    : driver_(std::move(driver)),
      stream_(stream),
      running_(MakePair(options.buffer_bytes, running)),
      captured_(MakePair(options.captured_bytes, captured)),
      waits_for_values_(
          !options.wait_by_function &&
          driver_->WaitForValue(stream, running_.slots[0].buffer->done(), TransferBuffer::kSet)) {}

Lane::SlotPair Lane::MakePair(int64_t bytes, Handover& handover) const {
  SlotPair pair;
  for (Slot& slot : pair.slots) slot.buffer = std::make_unique<TransferBuffer>(driver_, bytes);
  pair.handover = &handover;
  return pair;
}

void Lane::Submit(StreamWork& work, const Call::Tensors& tensors) {
  const std::lock_guard lock(mutex_);
  SlotPair& pair = CurrentPair();
  Forget(pair, work);  // The host has given the layer's last call up.
  try {
    SubmitPieces(pair, work, tensors);
  } catch (...) {
    Forget(pair, work);
    throw;
  }
}

Lane::SlotPair& Lane::CurrentPair() {
  const std::optional<uint64_t> capture = driver_->CaptureId(stream_);
  if (!capture.has_value()) return running_;
  if (captured_.capture != capture) {
    // What an earlier capture left behind is no part of this graph. But it or another graph may
    // have run right before this one.
    for (Slot& slot : captured_.slots) {
      slot.taken = slot.unawaited = false;
      slot.lent = true;
    }
    captured_.waiting.clear();
    captured_.capture = capture;
  }
  return captured_;
}

void Lane::SubmitPieces(SlotPair& pair, StreamWork& work, const Call::Tensors& tensors) {
  const Call::Options& options = work.call().options();
  const int64_t hidden = work.call().layer().config().hidden_size;
  const int64_t bytes = pair.slots[0].buffer->bytes();
  const int64_t most = TransferLayout::TokensIn(bytes, hidden, options);
  Require(most > 0, "submit: a token of this layer needs a buffer of ",
          TransferLayout::BufferBytes(hidden, options, 1), " bytes, but those of the bridge have ",
          bytes, "; make the bridge with larger buffers");
  const TransferLayout token(hidden, options, 1);
  int64_t begin = 0;
  do {
    Call::Tensors piece = tensors;
    piece.tokens = std::min(most, tensors.tokens - begin);
    piece.hidden_states = Skip(tensors.hidden_states, begin * token.hidden_states.bytes);
    piece.ids = Skip(tensors.ids, begin * token.ids.bytes);
    piece.weights = tensors.weights + begin * options.top_k;
    piece.output = static_cast<std::byte*>(tensors.output) + begin * token.output.bytes;
    SubmitPiece(pair, work, piece, begin, tensors.tokens);
    begin += piece.tokens;
  } while (begin < tensors.tokens);
}

void Lane::SubmitPiece(SlotPair& pair, StreamWork& work, const Call::Tensors& tensors,
                       int64_t first, int64_t of) {
  const TransferLayout layout(work.call().layer().config().hidden_size, work.call().options(),
                              tensors.tokens);
  pair.waiting.reserve(pair.waiting.size() + 1);
  Slot* slot = nullptr;
  if (tensors.tokens > 0) {
    slot = &TakeSlot(pair, work);
    const auto copy = [&](const TransferLayout::Range& to, const void* from) {
      if (to.bytes > 0) driver_->CopyToHost(stream_, slot->buffer->At(to), from, to.bytes);
    };
    copy(layout.hidden_states, tensors.hidden_states);
    copy(layout.ids, tensors.ids);
    copy(layout.weights, tensors.weights);
    Handover& handover = *pair.handover;
    const std::lock_guard lock(handover.mutex);
    // The jobs of another runtime may run at the same time, so the stream waits for the last one.
    if (handover.last != nullptr && handover.runtime != &work.runtime()) {
      Await(handover.last->done());
      if (handover.last_defers) Await(handover.last->idle());
    }
    work.Launch(*driver_, stream_, pair.capture.has_value(),
                {*slot->buffer, layout, first, tensors.tokens, of, handover.sum});
    handover.last = slot->buffer.get();
    handover.last_defers = work.defers();
    handover.runtime = &work.runtime();
    slot->unawaited = slot->taken = true;
    slot->lent = work.defers();
  }
  pair.waiting.push_back({&work, slot, layout.output, tensors.output});
}

Lane::Slot& Lane::TakeSlot(SlotPair& pair, const StreamWork& work) {
  for (;;) {
    for (size_t i = 0; i < pair.slots.size(); ++i) {
      Slot& slot = pair.slots[(pair.next + i) % pair.slots.size()];
      if (slot.taken) continue;
      Settle(slot);
      pair.next = (pair.next + i + 1) % pair.slots.size();
      return slot;
    }
    if (Fetch(pair, work)) continue;  // an earlier piece of the same call
    // An error may have kept the host from fetching the others' calls.
    const auto has_slot = [](const WaitingCall& call) { return call.slot != nullptr; };
    Forget(pair, *std::ranges::find_if(pair.waiting, has_slot)->work);
  }
}

void Lane::Settle(Slot& slot) {
  if (slot.unawaited) Await(slot.buffer->done());
  slot.unawaited = false;
  if (slot.lent) Await(slot.buffer->idle());
  slot.lent = false;
}

void Lane::Await(std::atomic<uint32_t>& word) {
  if (!waits_for_values_ || !driver_->WaitForValue(stream_, word, TransferBuffer::kSet)) {
    driver_->Launch(stream_, &AwaitSet, &word);
  }
}

void Lane::Sync(const StreamWork& work) {
  const std::lock_guard lock(mutex_);
  SlotPair& pair = CurrentPair();
  if (!Fetch(pair, work)) {
    throw std::runtime_error(
        "sync: this layer has no call on this stream, or two layers were called after it; call "
        "submit first, on the same stream");
  }
  while (Fetch(pair, work)) {
  }
}

bool Lane::Fetch(SlotPair& pair, const StreamWork& work) {
  const auto same = [&](const WaitingCall& call) { return call.work == &work; };
  const auto call = std::ranges::find_if(pair.waiting, same);
  if (call == pair.waiting.end()) return false;
  if (call->slot != nullptr) {
    if (call->slot->unawaited) Await(call->slot->buffer->done());
    call->slot->unawaited = false;
    driver_->CopyToDevice(stream_, call->output, call->slot->buffer->At(call->from),
                          call->from.bytes);
    call->slot->taken = false;
  }
  pair.waiting.erase(call);
  return true;
}

void Lane::Forget(SlotPair& pair, const StreamWork& work) noexcept {
  std::erase_if(pair.waiting, [&](const WaitingCall& call) {
    if (call.work != &work) return false;
    if (call.slot != nullptr) call.slot->taken = false;
    return true;
  });
}

void Lane::Abandon(const StreamWork& work) noexcept {
  const std::lock_guard lock(mutex_);
  Forget(running_, work);
  Forget(captured_, work);
}

}  // namespace cpumoe
