// Emulator of x86 instructions that this CPU lacks, for tests only.
//
// The compiled code of an ISA variant runs unchanged: an instruction that the CPU does not know
// raises SIGILL, and the handler executes it on the registers saved in the signal frame, or on tile
// registers of its own. So a machine with AVX2 tests the variant for AVX-VNNI, and one with AVX-512
// those for AVX512_BF16 and AMX, whether or not it has them. Where the CPU knows the instructions,
// nothing traps and nothing is counted. CPUID and the permission to use tile data are not emulated:
// whoever selects the variant has to override its CPU detection.
//
// A tile instruction that a CPU would refuse for the shape of its tiles ends the process with a
// message that says why.
//
// Reference: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM).
#pragma once

#include <csignal>
#include <cstdint>
#include <string_view>

#include "instructions.h"

namespace cpumoe::emulator {

// Whether the emulator executes a CPU feature's instructions (instructions.h) on this CPU, which
// needs AVX2 for AVX-VNNI and AVX-512F for all others, with their state enabled by the system.
bool Supports(std::string_view feature);

// Installs the SIGILL handler for all threads; no effect if it would support nothing, or is already
// installed. What the handler does not know goes on to the action that was installed before.
void Install();

// Puts the earlier action back, unless somebody has installed a handler over this one.
void Uninstall();

// Instructions emulated since the last ResetCounts(), and the signals that took: a run of adjacent
// instructions costs one signal.
uint64_t Count(Instruction instruction);
uint64_t Traps();
void ResetCounts();

// The same since the program's start.
uint64_t TotalCount(Instruction instruction);

// For whoever intercepts sigaction(): while the handler is installed, a new SIGILL action goes
// behind it instead of on top. Returns false, and does nothing, if the handler is not installed.
bool ReplaceChainedAction(const struct sigaction* action, struct sigaction* old_action);

}  // namespace cpumoe::emulator
