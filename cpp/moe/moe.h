// The interface of a layer's routed experts, for every weight format and ISA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/float_types.h"
#include "formats/weight_format.h"
#include "moe/config.h"
#include "moe/routing.h"
#include "moe/workspace.h"
#include "packing/raw_matrix.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// One expert in the form in which its checkpoint stores it.
struct ExpertSource {
  RawMatrix gate, up;                // [intermediate_size, hidden_size]
  RawMatrix down;                    // [hidden_size, intermediate_size]
  const float* gate_bias = nullptr;  // [intermediate_size]; all three biases, or none
  const float* up_bias = nullptr;
  const float* down_bias = nullptr;  // [hidden_size]
};

// Where to write the intermediate features [intermediate_begin, intermediate_begin + gate.rows) of
// an expert. They are all features, or one rank's share of a tensor-parallel split.
struct ExpertDestination {
  MutableRawMatrix gate, up, down;
  int64_t intermediate_begin = 0;
};

struct ForwardArgs {
  RoutingInput routing;
  DType dtype = DType::kBf16;  // of hidden_states and output
  // Whether activations of an fp32 call may be rounded to bf16. Otherwise they keep 21 bits or
  // more. Calls in other dtypes always allow it. The int8 path ignores this field and rounds to
  // int8.
  bool fp32_as_bf16 = false;
  const void* hidden_states = nullptr;  // [tokens, hidden_size], rows hidden_stride elements apart
  int64_t hidden_stride = 0;
  int64_t tokens = 0;
  void* output = nullptr;  // [tokens, hidden_size], dense, overwritten
};

class Moe {
 public:
  virtual ~Moe() = default;

  virtual const MoeConfig& config() const = 0;
  virtual size_t nbytes() const = 0;  // of packed weights and biases

  // Packs one expert. Throws std::invalid_argument if a shape or a scale violates the config or the
  // format. The expert then has no weights.
  virtual void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) = 0;

  // Writes the checkpoint bytes of a packed expert to `out`.
  virtual void Unpack(int64_t expert, const ExpertDestination& out, ThreadPool& pool) const = 0;

  // output[t] = sum over the token's experts of weight * expert(hidden_states[t]). Only one thread
  // at a time may call Forward with a given workspace.
  virtual void Forward(const ForwardArgs& args, ThreadPool& pool, Workspace& workspace) const = 0;
};

}  // namespace cpumoe
