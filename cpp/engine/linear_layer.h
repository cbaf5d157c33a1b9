// One dense matrix: a handle that calls share with the host, and the calls.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/float_types.h"
#include "engine/node.h"
#include "engine/placement.h"
#include "engine/runtime.h"
#include "linear/linear.h"

namespace cpumoe {

// Never changes once it is made, so any thread may use it, and a forked child as well, on a runtime
// of its own.
class LinearLayer {
 public:
  // Packs `source`, and `bias` [out_features] unless it is null, on variant `isa`, into the
  // memories of the runtime's nodes. `origin` names who asked for the variant, for errors. Throws
  // std::invalid_argument, OutOfMemory, and std::runtime_error if the variant's library is missing
  // or damaged.
  static std::shared_ptr<const LinearLayer> Create(Runtime& runtime, const std::string& isa,
                                                   const std::string& origin,
                                                   const std::string& format,
                                                   const RawMatrix& source, const float* bias,
                                                   const KernelOptions& kernels);

  size_t nbytes() const { return linear_->bytes(); }
  // What the stored matrix had; the grid's type is not kOwn.
  const StoredScales& scales() const { return linear_->scales(); }
  // Where the weights lie, a share for each node of the runtime that packed them.
  std::vector<Placement> placement() const { return PlacementOf(linear_->memory()); }

  // Writes the matrix to `out` in its checkpoint's form. Throws std::invalid_argument if a shape
  // does not fit.
  void Unpack(Runtime& runtime, const MutableRawMatrix& out) const;

  const Linear& linear() const { return *linear_; }

 private:
  explicit LinearLayer(std::unique_ptr<const Linear> linear) : linear_(std::move(linear)) {}

  const std::unique_ptr<const Linear> linear_;
};

// A product that hosts compute again and again: what is the same each time is fixed once. A call
// needs neither Python nor the GIL.
class LinearCall {
 public:
  struct Options {
    DType input_dtype = DType::kBf16;
    DType output_dtype = DType::kBf16;
    bool fp32_as_bf16 = false;  // whether fp32 activations may be rounded to bf16
  };

  LinearCall(std::shared_ptr<Runtime> runtime, std::shared_ptr<const LinearLayer> layer,
             const Options& options)
      : runtime_(std::move(runtime)), layer_(std::move(layer)), options_(options) {}

  // output [tokens, out_features] = x W^T + b. Strides are elements from one row to the next. Any
  // number of threads may do so at once. Throws std::invalid_argument (an address is null, a size
  // is out of range) and std::runtime_error (the runtime is closed, or belongs to the process that
  // forked this one).
  void Execute(const void* x, int64_t x_stride, int64_t tokens, void* output,
               int64_t output_stride) const;

 private:
  const std::shared_ptr<Runtime> runtime_;
  const std::shared_ptr<const LinearLayer> layer_;
  const Options options_;
};

}  // namespace cpumoe
