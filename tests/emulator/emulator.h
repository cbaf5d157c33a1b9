// An emulator of x86 instructions that this CPU lacks, for tests only.
//
// The compiled code of an ISA variant runs unchanged. An instruction that the CPU does not know
// raises SIGILL. The handler then executes the instruction on the registers saved in the signal
// frame, or on tile registers of its own. So a machine with AVX2 can test the variant for AVX-VNNI,
// and a machine with AVX-512 can test the variants for AVX512_BF16 and AMX. If the CPU knows the
// instructions, nothing traps and nothing is counted.
//
// CPUID and the permission to use tile data are not emulated. Code that selects the variant has to
// override its CPU detection.
//
// If a CPU would refuse a tile instruction because of the shape of its tiles, the process ends with
// a message that says why.
//
// Reference: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM).
#pragma once

#include <csignal>
#include <cstdint>
#include <string_view>

#include "instructions.h"

namespace cpumoe::emulator {

// Whether the emulator executes the instructions of a CPU feature (instructions.h) on this CPU.
// AVX-VNNI needs a CPU with AVX2, and all other features need AVX-512F. The operating system must
// have enabled the registers of both.
bool Supports(std::string_view feature);

// Installs the SIGILL handler for all threads. Has no effect if the handler would support nothing
// or is already installed. Instructions that the handler does not know go on to the action that was
// installed before.
void Install();

// Puts the earlier action back, unless another handler has been installed over this one.
void Uninstall();

// Instructions emulated since the last ResetCounts(), and the number of signals for them. A run of
// adjacent instructions costs one signal.
uint64_t Count(Instruction instruction);
uint64_t Traps();
void ResetCounts();

// Instructions emulated since the program's start.
uint64_t TotalCount(Instruction instruction);

// For code that intercepts sigaction(). While the handler is installed, a new SIGILL action is
// chained behind the handler instead of replacing it. Returns false, and does nothing, if the
// handler is not installed.
bool ReplaceChainedAction(const struct sigaction* action, struct sigaction* old_action);

}  // namespace cpumoe::emulator
