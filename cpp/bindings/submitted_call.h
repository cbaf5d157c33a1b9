// What Python holds of work that a runtime's driver does.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "engine/pending_call.h"

namespace cpumoe {

// A call that the driver thread makes, and the Python objects whose memory the call reads and
// writes. The objects live from before the call is queued until the call has ended.
class SubmittedCall {
 public:
  explicit SubmittedCall(pybind11::object owned) : owned_(std::move(owned)) {}
  ~SubmittedCall() {
    const pybind11::gil_scoped_release release;
    pending_.WaitQuietly();
  }
  SubmittedCall(const SubmittedCall&) = delete;
  SubmittedCall& operator=(const SubmittedCall&) = delete;

  // `data` lives as long as the Python objects.
  void Start(PendingCall pending, std::shared_ptr<const void> data = nullptr) {
    data_ = std::move(data);
    pending_ = std::move(pending);
  }
  bool Done() const { return pending_.Done(); }
  void Wait() { pending_.Wait(); }
  bool WaitFor(double seconds) { return pending_.WaitFor(seconds); }

 private:
  pybind11::object owned_;
  std::shared_ptr<const void> data_;
  PendingCall pending_;
};

}  // namespace cpumoe
