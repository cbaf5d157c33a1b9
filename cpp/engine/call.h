// A forward call that hosts make again and again: what is the same each time is fixed once.
//
// No Python, no GIL, no object of a host: a GPU stream's host function, a compiler's operator and a
// C program can make the call through one C function pointer and one address.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>

#include "base/float_types.h"
#include "engine/layer.h"
#include "engine/runtime.h"
#include "moe/moe.h"

namespace cpumoe {

class Call {
 public:
  // Fixed for the life of a call.
  struct Options {
    DType input_dtype = DType::kBf16;
    DType output_dtype = DType::kBf16;
    // Whether results are added onto the output, which must then be fp32.
    bool accumulate = false;
    bool fp32_as_bf16 = false;  // whether fp32 activations may be rounded to bf16
    int64_t top_k = 0;
    bool ids_are_64_bit = false;
    // [num_experts], not zero: skipped. Null: the layer's mask applies. Read whenever the call
    // runs, so the host may change the bytes between two runs.
    const uint8_t* mask = nullptr;
  };

  // May differ each time. Shapes and meaning are those of ForwardArgs and RoutingInput.
  struct Tensors {
    const void* hidden_states = nullptr;
    int64_t hidden_stride = 0;  // elements from one row to the next
    int64_t tokens = 0;
    const void* ids = nullptr;
    const float* weights = nullptr;
    void* output = nullptr;
  };

  // The call keeps the runtime and the layer alive. Throws std::invalid_argument.
  Call(std::shared_ptr<Runtime> runtime, std::shared_ptr<const Layer> layer,
       const Options& options);

  const Options& options() const { return options_; }
  const Layer& layer() const { return *layer_; }
  Runtime& runtime() const { return *runtime_; }

  // What the layer's forward pass gets, for hosts that make it themselves. Throws
  // std::invalid_argument if an address is null or a size is negative.
  ForwardArgs Args(const Tensors& tensors) const;

  // Makes the call and returns when it has ended. Any number of threads may do so at once. Throws
  // std::invalid_argument (an address is null, an expert has no weights), std::out_of_range (an id)
  // and std::runtime_error (the runtime is closed, or belongs to the process that forked this one).
  // After an exception the output is undefined.
  void Execute(const Tensors& tensors) const { ExecuteChecked(Args(tensors)); }

  // Lets the runtime's driver make the call. What `tensors` names must live, and the inputs must
  // not change, until the completion is done. With `copy_inputs` this holds for the output alone:
  // hidden states, ids and weights have been copied when Submit returns. The Call itself may be
  // destroyed meanwhile. Throws what Execute throws because of null addresses or the runtime; the
  // completion rethrows the rest.
  std::shared_ptr<Completion> Submit(const Tensors& tensors, bool copy_inputs = false) const {
    return SubmitChecked(Args(tensors), copy_inputs);
  }

  // Names the tensors of later calls of ExecuteBound, SubmitBound and Run. Not while another thread
  // is in one of them. Throws std::invalid_argument, and then changes nothing.
  void Bind(const Tensors& tensors);

  // Execute and Submit with the tensors that were bound; no tokens if none were.
  void ExecuteBound() const { ExecuteChecked(bound_); }
  std::shared_ptr<Completion> SubmitBound(bool copy_inputs = false) const {
    return SubmitChecked(bound_, copy_inputs);
  }

  // ExecuteBound for hosts that take no exception. Returns false and keeps the exception if there
  // is one. Any thread may call Run, several at once as well.
  bool Run() noexcept;

  // Run for hosts that take a C function pointer, e.g. cudaLaunchHostFunc. `call` is a Call.
  static void RunCallback(void* call) noexcept { static_cast<Call*>(call)->Run(); }

  // The first exception of Run since the last TakeError; null if there was none. Later exceptions
  // and successes do not replace it, so that a host can ask once after many runs.
  std::exception_ptr TakeError() noexcept;

  // Keeps an exception for TakeError, unless one is kept already. For hosts with a callback of
  // their own.
  void KeepError(std::exception_ptr error) noexcept;

 private:
  // The state of error_. There is no mutex, because a forked child may take the error, too.
  enum class ErrorState { kNone, kBusy, kKept };

  void ExecuteChecked(const ForwardArgs& args) const;
  std::shared_ptr<Completion> SubmitChecked(ForwardArgs args, bool copy_inputs) const;

  const std::shared_ptr<Runtime> runtime_;
  const std::shared_ptr<const Layer> layer_;
  const Options options_;
  ForwardArgs bound_;
  std::atomic<ErrorState> error_state_{ErrorState::kNone};
  std::exception_ptr error_;
};

}  // namespace cpumoe
