// Copies what a call reads, so that the host may overwrite its inputs before the call runs.
#pragma once

#include <cstdint>
#include <memory>

#include "moe/moe.h"

namespace cpumoe {

// Lets the inputs of `args` (hidden states, ids, weights) point to copies, which the returned
// object owns. Rows of the copy are dense. Each input begins on a cache line.
std::shared_ptr<const void> CopyInputs(ForwardArgs& args, int64_t hidden_size);

}  // namespace cpumoe
