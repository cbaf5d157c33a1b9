// AVX512_BF16: VDPBF16PS, VCVTNEPS2BF16 and VCVTNE2PS2BF16 (SDM volume 2).
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <cstdint>

#include "emulator.h"
#include "signal_frame.h"
#include "x86_decode.h"

namespace cpumoe::emulator {

// Executes `decoded` on the registers of `frame`, except for moving RIP, and sets `executed`.
// Returns false, with no effect, if `decoded` is none of these instructions or has an encoding that
// the CPU would refuse.
bool EmulateAvx512Bf16(const DecodedInstruction& decoded, SignalFrame* frame,
                       Instruction* executed);

// The arithmetic of VDPBF16PS on bit patterns. Lane i of a and b holds bf16 elements 2i (low half)
// and 2i+1: sums[i] = fma(a[2i], b[2i], fma(a[2i+1], b[2i+1], sums[i])).
void DotProductBf16(const uint32_t a[16], const uint32_t b[16], uint32_t sums[16]);
uint16_t ConvertToBf16(uint32_t fp32);

}  // namespace cpumoe::emulator

#endif
