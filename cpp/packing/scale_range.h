// The least and the greatest scale of a matrix, which decide whether scales fold into the
// multiplicands exactly.
#pragma once

#include <algorithm>
#include <limits>

namespace cpumoe {

struct ScaleRange {
  float least = std::numeric_limits<float>::infinity();
  float greatest = 0.0f;

  // Whether all scales are so far from the ends of fp32's exponents that every format's products
  // are normal numbers on every ISA.
  bool IsUsual() const { return least >= 0x1p-100f && greatest <= 0x1p100f; }

  void Merge(const ScaleRange& other) {
    least = std::min(least, other.least);
    greatest = std::max(greatest, other.greatest);
  }
};

}  // namespace cpumoe
