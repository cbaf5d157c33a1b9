// A library that claims to be a variant and must be refused. A macro says why:
// CPUMOE_TEST_OTHER_BUILD: its build id is another one; CPUMOE_TEST_NO_BUILD_ID: it has none, as
// libraries of 0.1.0's first builds; CPUMOE_TEST_OTHER_ISA: it is linked with this build's id, and
// its table names an ISA that does not exist.
#include <cstdlib>

#include "variant/build_id.h"
#include "variant/variant_api.h"

#ifdef CPUMOE_TEST_OTHER_BUILD
extern "C" const char cpumoe_build_id[cpumoe::kBuildIdBytes] = "0.0.9+0123456789abcdef";
#endif

extern "C" __attribute__((visibility("default"))) const cpumoe::VariantApi* cpumoe_variant_api() {
#ifndef CPUMOE_TEST_OTHER_ISA
  abort();  // not to be called
#endif
  static const cpumoe::VariantApi api = {.isa = "sse9",
                                         .num_formats = 0,
                                         .formats = nullptr,
                                         .num_peaks = 0,
                                         .peaks = nullptr,
                                         .read = nullptr,
                                         .few_tokens = {}};
  return &api;
}
