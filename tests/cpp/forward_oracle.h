// What a forward call should give: the reference in double precision, and how far fp32 arithmetic
// with rounded activations may be from it.
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
  bool int8;       // instead, to 1/127 of the greatest of each group
  bool as_digits;  // perhaps to integers of 21 bits, or 14 in calls of bf16
};

Expectation Expect(const TestLayer& layer, const Batch& batch, Rounding rounding);

// Fails with the worst element if any is out of its bound.
void ExpectClose(const Expectation& expected, const std::vector<double>& actual, int64_t hidden);

}  // namespace cpumoe
