// This file has only data, and its object file is linked into _core and into every variant library.
#include "variant/build_id.h"

#include "build_id.inc"

extern "C" const char cpumoe_build_id[cpumoe::kBuildIdBytes] = CPUMOE_BUILD_ID;

namespace cpumoe {

const char* const kVersion = CPUMOE_VERSION;
const char* const kBuildId = CPUMOE_BUILD_ID;

}  // namespace cpumoe
