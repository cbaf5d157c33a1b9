// Calls of attention. Attention has no weights, so a call is all there is.
#pragma once

#include <memory>
#include <string>

#include "attention/attention.h"
#include "engine/runtime.h"
#include "variant/variant_api.h"

namespace cpumoe {

// Attention on one runtime and variant. It needs neither Python nor the GIL.
class AttentionCall {
 public:
  // `origin` names who asked for the variant, for errors. Throws std::invalid_argument, and
  // std::runtime_error if the variant's library is missing or damaged.
  AttentionCall(std::shared_ptr<Runtime> runtime, const std::string& isa,
                const std::string& origin);

  // Any number of threads may do so at once. Throws std::invalid_argument (an address is null, a
  // size is out of range), OutOfMemory, and std::runtime_error (the runtime is closed, or belongs
  // to the process that forked this one).
  void Execute(const AttentionArgs& args) const;

 private:
  const std::shared_ptr<Runtime> runtime_;
  const VariantApi& variant_;
};

}  // namespace cpumoe
