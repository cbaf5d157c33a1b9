// A weight in double precision, from checkpoint bytes. It shares only the formats' scalar
// definitions with the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/weight_format.h"

namespace cpumoe {

// A weight without the matrix's factor.
template <WeightFormat F>
double ReferenceWeight(const RawMatrix& m, int64_t row, int64_t column) {
  const std::byte* codes = m.codes + row * m.codes_stride;
  const int64_t bit = column * F::kCodeBits;
  uint32_t word = 0;
  std::memcpy(&word, codes + bit / 8, (F::kCodeBits + 7) / 8);
  const uint32_t code = (word >> (bit % 8)) & ((uint64_t{1} << F::kCodeBits) - 1);
  if constexpr (HasScales<F>) {
    const std::byte* scales = m.scales + row / m.grid.rows * m.scales_stride;
    return VisitScaleType<typename F::Scale>(m.grid.type, [&]<class Stored>(Stored scale) {
      std::memcpy(&scale, scales + column / m.grid.depth * sizeof(scale), sizeof(scale));
      return static_cast<double>(F::Decode(code)) * scale.ToFloat();
    });
  } else {
    return F::Decode(code);
  }
}

}  // namespace cpumoe
