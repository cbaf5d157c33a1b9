// The threads, CPUs and NUMA nodes that a C program asks for.
#pragma once

#include "capi/cpumoe.h"
#include "engine/node.h"

namespace cpumoe {

// Checks the options and the environment's CPUMOE_NODES. Throws std::invalid_argument, whose text
// names the option.
Node::Options ToNodeOptions(const cpumoe_runtime_options& options);

}  // namespace cpumoe
