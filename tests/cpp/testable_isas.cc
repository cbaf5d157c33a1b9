// Prints the ISAs whose tests can run here, natively or under the emulator, in the form that
// CPUMOE_ISAS takes.
#include <cstdio>
#include <string>

#include "cpp/isa_test.h"

int main() {
  std::string isas;
  for (const std::string& isa : cpumoe::IsaNames()) {
    if (cpumoe::ObstacleTo(isa).empty()) isas += (isas.empty() ? "" : ",") + isa;
  }
  std::puts(isas.c_str());
}
