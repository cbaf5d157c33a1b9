// The interface of a layer's routed experts, for every weight format and ISA.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/float_types.h"
#include "base/memory_node.h"
#include "formats/scale_grid.h"
#include "formats/weight_format.h"
#include "moe/config.h"
#include "moe/counters.h"
#include "moe/routing.h"
#include "moe/workspace.h"
#include "packing/raw_matrix.h"
#include "threading/thread_pool.h"

namespace cpumoe {

// One expert in the form in which its checkpoint stores it.
struct ExpertSource {
  RawMatrix gate, up;                // [intermediate_size, hidden_size]; no gate: empty
  RawMatrix down;                    // [hidden_size, intermediate_size]
  const float* gate_bias = nullptr;  // [intermediate_size]; biases of all matrices, or none
  const float* up_bias = nullptr;
  const float* down_bias = nullptr;  // [hidden_size]
};

// Where to write the intermediate features [intermediate_begin, intermediate_begin + up.rows) of
// an expert. The gate is ignored where experts have none. They are all features, or one rank's
// share of a tensor-parallel split. Scales have any grid and type that can hold those of the
// checkpoint (RawMatrix::grid). Factors are not written (Moe::Scales).
struct ExpertDestination {
  MutableRawMatrix gate, up, down;
  int64_t intermediate_begin = 0;
};

struct ForwardArgs {
  RoutingInput routing;
  DType input_dtype = DType::kBf16;   // of hidden_states
  DType output_dtype = DType::kBf16;  // of output; any combination is possible
  // Whether the results are added onto what `output` holds, which must then be fp32. The sum over a
  // token's experts is complete before it is added, so that the addition rounds once. Otherwise
  // `output` is overwritten.
  bool accumulate = false;
  // Whether activations of an fp32 call may be rounded to bf16. Otherwise they keep 21 bits or
  // more. Calls in other dtypes always allow it. The int8 path ignores this field and rounds to
  // int8.
  bool fp32_as_bf16 = false;
  const void* hidden_states = nullptr;  // [tokens, hidden_size], rows hidden_stride elements apart
  int64_t hidden_stride = 0;
  int64_t tokens = 0;
  LayerCounters* counters = nullptr;  // to which the call adds; may be null
  void* output = nullptr;             // [tokens, hidden_size], dense; undefined after an exception
};

class Moe {
 public:
  virtual ~Moe() = default;

  virtual const MoeConfig& config() const = 0;
  // The bytes of one packed copy (MoeConfig::copy_of), its biases included.
  virtual int64_t copy_bytes() const = 0;
  // The memory of all packed copies, one share for each node.
  virtual std::vector<MemoryShare> memory() const = 0;
  virtual bool HasWeights(int64_t expert) const = 0;  // throws std::out_of_range
  // What the stored gate, up and down of an expert had; the types of grids are not kOwn. Throws
  // std::out_of_range, and std::invalid_argument if the expert has no weights.
  virtual std::array<StoredScales, 3> Scales(int64_t expert) const = 0;

  // Packs one expert, for its replicas as well. Throws std::invalid_argument if a shape or a scale
  // violates the config or the format. The expert then has no weights.
  virtual void Pack(int64_t expert, const ExpertSource& source, ThreadPool& pool) = 0;

  // Gives the memory of an expert's weights back to the system. The expert and its replicas then
  // have no weights, and take memory again when one of them is packed again. Throws
  // std::out_of_range and std::system_error.
  virtual void Evict(int64_t expert) = 0;

  // The number of tasks, about 64 KiB each, that write an expert to `out`. Throws
  // std::invalid_argument if a shape does not fit.
  virtual int64_t UnpackTasks(std::span<const ExpertDestination> out) const = 0;
  // Does tasks [begin, end) of writing a packed expert to `out`. Throws std::invalid_argument and
  // std::out_of_range.
  virtual void Unpack(int64_t expert, std::span<const ExpertDestination> out, int64_t begin,
                      int64_t end, ThreadPool& pool) const = 0;

  // output[t] = sum over the token's experts of weight * expert(hidden_states[t]), or += (see
  // ForwardArgs::accumulate). Only one thread at a time may call Forward with a given workspace.
  // Throws std::invalid_argument and std::out_of_range. Does not check that the output of a call
  // that accumulates is fp32.
  virtual void Forward(const ForwardArgs& args, ThreadPool& pool, Workspace& workspace) const = 0;
};

}  // namespace cpumoe
