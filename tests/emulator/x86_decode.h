// Decodes EVEX instructions, and VEX instructions of the maps 0F and 0F38: prefixes, ModRM, SIB,
// displacement (SDM volume 2, sections 2.1, 2.3 and 2.7). Computes the address of a memory operand
// from the registers of a signal frame.
//
// The decoder knows the encoding and no instruction. The files that emulate instructions know which
// opcodes exist, and the scale N of a compressed displacement.
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <ucontext.h>

#include <cstdint>

namespace cpumoe::emulator {

inline constexpr int kNoRegister = -1;
inline constexpr int kRip = -2;

// How VEX and EVEX encode opcode maps and the prefix.
inline constexpr uint8_t kMap0F = 1, kMap0F38 = 2;
inline constexpr uint8_t kNoPrefix = 0, kPrefix66 = 1, kPrefixF3 = 2, kPrefixF2 = 3;

enum class Segment : uint8_t { kFlat, kFs, kGs };

struct MemoryOperand {
  int base = kNoRegister;  // 0..15 as encoded (0 is RAX, 4 is RSP), kRip or kNoRegister
  int index = kNoRegister;
  int scale = 1;
  int32_t displacement = 0;
  bool displacement_is_byte = false;  // EVEX: the displacement is in units of N bytes
  bool address32 = false;             // the address is truncated to 32 bits
  bool has_sib = false;
  Segment segment = Segment::kFlat;
};

struct DecodedInstruction {
  bool is_vex = false;  // false: EVEX
  uint8_t length = 0;   // in bytes, without any immediate
  uint8_t map = 0;      // kMap0F, kMap0F38, ...
  uint8_t prefix = 0;   // kNoPrefix, kPrefix66, ...
  uint8_t opcode = 0;
  uint8_t vector_length = 0;  // 0: 128, 1: 256, 2: 512 bits, 3: reserved
  uint8_t mask = 0;           // k0..k7
  bool w = false;
  bool zeroing = false;
  bool broadcast = false;  // EVEX.b
  bool has_memory = false;
  uint8_t reg = 0;   // ModRM.reg, 0..31
  uint8_t vvvv = 0;  // 0..31; 0 where the field is unused
  uint8_t rm = 0;    // ModRM.rm as a register, 0..31; valid if !has_memory
  MemoryOperand memory;
};

// Reads the instruction at `code`, and no byte beyond what its encoding demands. Returns false if
// the instruction is not well-formed or has another encoding.
bool Decode(const uint8_t* code, DecodedInstruction* instruction);

// The address of an operand for a thread stopped in `registers`. It must be the calling thread,
// whose FS and GS bases are used. `displacement_unit` is the N of disp8*N.
uint64_t EffectiveAddress(const MemoryOperand& memory, int displacement_unit, uint64_t next_rip,
                          const mcontext_t& registers);

// The index register times the scale, which is the stride of a tile in memory. 0 if there is no
// index.
int64_t ScaledIndex(const MemoryOperand& memory, const mcontext_t& registers);

}  // namespace cpumoe::emulator

#endif
