// A weight matrix as Python describes it.
#pragma once

#include <cstdint>
#include <string>

#include "formats/scale_grid.h"
#include "packing/raw_matrix.h"

namespace cpumoe {

inline const void* AsPointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

// Addresses, and strides in bytes.
struct MatrixArgs {
  std::string name;
  int64_t rows, columns;
  uintptr_t codes;
  int64_t codes_stride;
  uintptr_t scales;
  int64_t scales_stride;
  ScaleGrid grid;
  float factor;

  template <class Byte>
  RawMatrixOf<Byte> View() const {
    return {rows,
            columns,
            reinterpret_cast<Byte*>(codes),
            codes_stride,
            reinterpret_cast<Byte*>(scales),
            scales_stride,
            grid,
            name.c_str(),
            factor};
  }
};

}  // namespace cpumoe
