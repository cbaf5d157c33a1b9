// Small integer helpers shared by every layer.
#pragma once

#include <cstdint>

namespace cpumoe {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDiv(a, multiple) * multiple; }

}  // namespace cpumoe
