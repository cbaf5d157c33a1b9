// The tensors of a call from the addresses that Python passes.
#pragma once

#include <cstdint>

#include "engine/call.h"

namespace cpumoe {

inline Call::Tensors TensorsAt(uintptr_t hidden_states, int64_t hidden_stride, int64_t tokens,
                               uintptr_t ids, uintptr_t weights, uintptr_t output) {
  return {.hidden_states = reinterpret_cast<const void*>(hidden_states),
          .hidden_stride = hidden_stride,
          .tokens = tokens,
          .ids = reinterpret_cast<const void*>(ids),
          .weights = reinterpret_cast<const float*>(weights),
          .output = reinterpret_cast<void*>(output)};
}

}  // namespace cpumoe
