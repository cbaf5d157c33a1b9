// The interface of one packed matrix, for every weight format and ISA: y = x W^T + b.
#pragma once

#include <cstdint>
#include <vector>

#include "base/float_types.h"
#include "base/memory_node.h"
#include "formats/scale_grid.h"
#include "packing/raw_matrix.h"
#include "paths/kernel_options.h"
#include "paths/scratch_memory.h"
#include "threading/thread_pool.h"

namespace cpumoe {

struct LinearConfig {
  int64_t out_features = 0;  // N
  int64_t in_features = 0;   // K
  bool has_bias = false;
  KernelOptions kernels = {};
  std::vector<MemoryNode> nodes = {};  // see MoeConfig::nodes
};

struct LinearArgs {
  DType input_dtype = DType::kBf16;   // of x
  DType output_dtype = DType::kBf16;  // of output; any combination is possible
  // Whether activations of an fp32 call may be rounded to bf16 (ForwardArgs::fp32_as_bf16).
  bool fp32_as_bf16 = false;
  const void* x = nullptr;  // [tokens, in_features], rows x_stride elements apart
  int64_t x_stride = 0;
  int64_t tokens = 0;
  void* output = nullptr;  // [tokens, out_features], rows output_stride elements apart
  int64_t output_stride = 0;
};

class Linear {
 public:
  virtual ~Linear() = default;

  virtual const LinearConfig& config() const = 0;
  // The bytes of the packed weights, the bias included.
  virtual int64_t bytes() const = 0;
  // What the stored matrix had; the grid's type is not kOwn.
  virtual const StoredScales& scales() const = 0;
  // The memory of the packed weights, one share for each node.
  virtual std::vector<MemoryShare> memory() const = 0;

  // Packs the matrix [out_features, in_features] and the bias [out_features], which is null without
  // biases. Throws std::invalid_argument if a shape or a scale violates the config or the format.
  virtual void Pack(const RawMatrix& source, const float* bias, ThreadPool& pool) = 0;

  // Writes the packed matrix to `out` in its checkpoint's form. Throws std::invalid_argument if a
  // shape does not fit, or if the scales of `out` cannot hold the stored ones.
  virtual void Unpack(const MutableRawMatrix& out, ThreadPool& pool) const = 0;

  // output = x W^T + b. Only one thread at a time may call Forward with given scratch memory.
  virtual void Forward(const LinearArgs& args, ThreadPool& pool, ScratchMemory& scratch) const = 0;
};

}  // namespace cpumoe
