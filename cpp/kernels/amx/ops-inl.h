// AMX: the tile registers multiply what AVX512_BF16 multiplies.
#pragma once

#include "kernels/avx512_bf16/ops-inl.h"

namespace cpumoe {

struct Amx : Avx512Bf16 {};

}  // namespace cpumoe
