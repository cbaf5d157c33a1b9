// AVX-VNNI: VPDPBUSD in its VEX encoding, on XMM and YMM registers (SDM volume 2).
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include "instructions.h"
#include "signal_frame.h"
#include "x86_decode.h"

namespace cpumoe::emulator {

// Executes `decoded` on the registers of `frame`, except for moving RIP, and sets `executed`.
// False, with no effect, if it is not this instruction in an encoding that the CPU would accept.
bool EmulateAvxVnni(const DecodedInstruction& decoded, SignalFrame* frame, Instruction* executed);

// The same for loads that stand between products: VMOVDQA, VMOVDQU and VPBROADCASTD from memory in
// their VEX encodings, which every CPU with AVX2 has. Where they are executed, too, a signal serves
// a whole group of products.
bool EmulateLoad(const DecodedInstruction& decoded, SignalFrame* frame);

}  // namespace cpumoe::emulator

#endif
