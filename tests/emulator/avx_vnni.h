// AVX-VNNI: VPDPBUSD in its VEX encoding, on XMM and YMM registers (SDM volume 2).
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include "instructions.h"
#include "signal_frame.h"
#include "x86_decode.h"

namespace cpumoe::emulator {

// Executes `decoded` on the registers of `frame`, except for moving RIP, and sets `executed`.
// Returns false, with no effect, if `decoded` is not VPDPBUSD or has an encoding that the CPU would
// refuse.
bool EmulateAvxVnni(const DecodedInstruction& decoded, SignalFrame* frame, Instruction* executed);

// Executes a load that stands between products: VMOVDQA, VMOVDQU or VPBROADCASTD from memory in VEX
// encoding. Every CPU with AVX2 has these instructions. Emulating them lets one signal serve a
// whole group of products.
bool EmulateLoad(const DecodedInstruction& decoded, SignalFrame* frame);

}  // namespace cpumoe::emulator

#endif
