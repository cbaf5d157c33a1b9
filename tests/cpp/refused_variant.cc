// A library that claims to be a variant and must be refused. A macro names the reason:
//
// CPUMOE_TEST_OTHER_BUILD   the build id is that of another build
// CPUMOE_TEST_NO_BUILD_ID   there is no build id, as in the libraries of 0.1.0's first builds
// CPUMOE_TEST_OTHER_ISA     the build id is right, but the table names an ISA that does not exist
#include <cstdlib>

#include "variant/build_id.h"
#include "variant/variant_api.h"

#ifdef CPUMOE_TEST_OTHER_BUILD
extern "C" const char cpumoe_build_id[cpumoe::kBuildIdBytes] = "0.0.9+0123456789abcdef";
#endif

extern "C" __attribute__((visibility("default"))) const cpumoe::VariantApi* cpumoe_variant_api() {
#ifndef CPUMOE_TEST_OTHER_ISA
  abort();  // must not be called
#endif
  static const cpumoe::VariantApi api = {.isa = "sse9",
                                         .num_formats = 0,
                                         .formats = nullptr,
                                         .read = nullptr,
                                         .copy = nullptr,
                                         .attend = nullptr,
                                         .weighted_sum = nullptr};
  return &api;
}
