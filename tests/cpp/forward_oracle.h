// The expected result of a forward call: the reference in double precision, and the greatest error
// that fp32 arithmetic with rounded activations may have.
#pragma once

#include <cstdint>
#include <vector>

#include "cpp/moe_test_util.h"

namespace cpumoe {

struct Expectation {
  std::vector<double> values;  // [tokens, hidden]
  std::vector<double> bounds;  // [tokens, hidden] of |actual - value|
};

// How kernels round the activations that they multiply.
struct Rounding {
  int bits;        // significant bits kept
  bool int8;       // instead of `bits`, to 1/127 of the greatest of each group
  bool as_digits;  // perhaps to integers of 21 bits, or of 14 bits in bf16 calls
};

Expectation Expect(const TestLayer& layer, const Batch& batch, Rounding rounding);

// Fails if an element is out of its bound, and shows the worst element.
void ExpectClose(const Expectation& expected, const std::vector<double>& actual, int64_t hidden);

}  // namespace cpumoe
