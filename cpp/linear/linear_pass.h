// The product of a packed matrix with a call's tokens, for all weight formats. A variant library
// instantiates it once per ISA (linear_pass-inl.h).
#pragma once

#include "linear/linear.h"
#include "linear/packed_matrix.h"
#include "paths/compute_path.h"

namespace cpumoe {

// Linear::Forward. `path` is one of the format of `matrix` on the ISA.
template <class Isa>
void ForwardLinear(const PackedMatrix& matrix, const ComputePath& path, const LinearArgs& args,
                   ThreadPool& pool, ScratchMemory& scratch);

}  // namespace cpumoe
