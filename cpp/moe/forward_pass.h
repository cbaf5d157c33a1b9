// The forward pass of a layer's experts, for all weight formats. A variant library instantiates it
// once per ISA (forward_pass-inl.h).
#pragma once

#include "moe/moe.h"
#include "moe/packed_experts.h"
#include "paths/compute_path.h"

namespace cpumoe {

// Moe::Forward. `path` is one of the format of `weights` on the ISA.
template <class Isa>
void ForwardExperts(const PackedExperts& weights, const ComputePath& path, const ForwardArgs& args,
                    ThreadPool& pool, Workspace& workspace);

}  // namespace cpumoe
