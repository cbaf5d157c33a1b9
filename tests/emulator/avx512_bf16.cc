// See avx512_bf16.h. Compiled with baseline flags.
//
// VDPBF16PS follows the SDM's pseudocode: two fused multiply-adds in sequence, the odd elements
// first. Each rounds to nearest even and treats denormals as zero on input and output. MXCSR is
// neither read nor updated. Two VFMADD231PS have the SDM's NaN priorities (a low, b low, a high, b
// high, sum). Therefore the emulator uses VFMADD231PS itself, which any CPU with AVX-512F has,
// under an MXCSR of its own.
#include "avx512_bf16.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cstring>

namespace cpumoe::emulator {
namespace {

// Round to nearest even, all exceptions masked, flush to zero, denormals are zero.
constexpr uint32_t kMxcsr = 0x9FC0;

bool Identify(const DecodedInstruction& decoded, Instruction* instruction) {
  if (decoded.is_vex || decoded.map != kMap0F38 || decoded.w) return false;
  if (decoded.opcode == 0x52 && decoded.prefix == kPrefixF3) {
    *instruction = Instruction::kVdpbf16ps;
  } else if (decoded.opcode == 0x72 && decoded.prefix == kPrefixF3) {
    *instruction = Instruction::kVcvtneps2bf16;
  } else if (decoded.opcode == 0x72 && decoded.prefix == kPrefixF2) {
    *instruction = Instruction::kVcvtne2ps2bf16;
  } else {
    return false;
  }
  return true;
}

// Whether an encoding of these opcodes raises #UD even on a CPU with AVX512_BF16.
bool IsReserved(const DecodedInstruction& decoded, Instruction instruction) {
  return decoded.vector_length == 3 || (decoded.broadcast && !decoded.has_memory) ||
         (decoded.zeroing && decoded.mask == 0) ||
         (instruction == Instruction::kVcvtneps2bf16 && decoded.vvvv != 0);
}

int NumLanes(const DecodedInstruction& decoded) { return 4 << decoded.vector_length; }

// Reads the operand ModRM.rm. If the operand is in memory, only the lanes whose bit is set in
// `wanted` are touched, and the other lanes are zero.
void ReadLastOperand(const DecodedInstruction& decoded, const SignalFrame& frame, uint64_t wanted,
                     uint32_t lanes[16]) {
  if (!decoded.has_memory) {
    frame.ReadVector(decoded.rm, lanes);
    return;
  }
  const int num_lanes = NumLanes(decoded);
  const uint64_t all = (uint64_t{1} << num_lanes) - 1;
  wanted &= all;
  std::memset(lanes, 0, 64);
  if (wanted == 0) return;
  const int unit = decoded.broadcast ? 4 : num_lanes * 4;
  const uint64_t address =
      EffectiveAddress(decoded.memory, unit, frame.rip() + decoded.length, frame.registers());
  const uint8_t* memory = reinterpret_cast<const uint8_t*>(address);
  if (decoded.broadcast) {
    uint32_t element;
    std::memcpy(&element, memory, 4);
    for (int i = 0; i < num_lanes; ++i) lanes[i] = element;
  } else if (wanted == all) {
    std::memcpy(lanes, memory, static_cast<size_t>(unit));
  } else {
    for (int i = 0; i < num_lanes; ++i) {
      if ((wanted >> i & 1) != 0) std::memcpy(&lanes[i], memory + i * 4, 4);
    }
  }
}

// Replaces each masked-off result[i] by zero, or by the old element of the destination.
template <typename T>
void ApplyMask(const DecodedInstruction& decoded, uint64_t mask, int count, const T* destination,
               T* result) {
  for (int i = 0; i < count; ++i) {
    if ((mask >> i & 1) == 0) result[i] = decoded.zeroing ? T{0} : destination[i];
  }
}

void DotProduct(const DecodedInstruction& decoded, uint64_t mask, SignalFrame* frame) {
  uint32_t a[16], b[16], destination[16], result[16];
  ReadLastOperand(decoded, *frame, mask, b);
  frame->ReadVector(decoded.vvvv, a);
  frame->ReadVector(decoded.reg, destination);
  std::memcpy(result, destination, sizeof(result));
  DotProductBf16(a, b, result);
  const int num_lanes = NumLanes(decoded);
  ApplyMask(decoded, mask, num_lanes, destination, result);
  std::memset(result + num_lanes, 0, sizeof(uint32_t) * static_cast<size_t>(16 - num_lanes));
  frame->WriteVector(decoded.reg, result);
}

// VCVTNE2PS2BF16 fills the destination's lower half from ModRM.rm and the upper half from vvvv.
// VCVTNEPS2BF16 writes the lower half only. VCVTNE2PS2BF16 does not suppress the faults of
// masked-off elements (exception type E4NF), VCVTNEPS2BF16 does (E4).
void Convert(const DecodedInstruction& decoded, bool two_sources, uint64_t mask,
             SignalFrame* frame) {
  uint32_t low[16], high[16], destination[16], result[16] = {};
  uint16_t old_words[32], words[32] = {};
  ReadLastOperand(decoded, *frame, two_sources ? ~uint64_t{0} : mask, low);
  frame->ReadVector(decoded.reg, destination);
  std::memcpy(old_words, destination, sizeof(old_words));
  const int num_lanes = NumLanes(decoded);
  for (int i = 0; i < num_lanes; ++i) words[i] = ConvertToBf16(low[i]);
  if (two_sources) {
    frame->ReadVector(decoded.vvvv, high);
    for (int i = 0; i < num_lanes; ++i) words[num_lanes + i] = ConvertToBf16(high[i]);
  }
  ApplyMask(decoded, mask, two_sources ? 2 * num_lanes : num_lanes, old_words, words);
  std::memcpy(result, words, sizeof(result));
  frame->WriteVector(decoded.reg, result);
}

}  // namespace

void DotProductBf16(const uint32_t a[16], const uint32_t b[16], uint32_t sums[16]) {
  uint32_t saved_mxcsr;
  // A bf16 is the upper half of an fp32. Odd elements need a cleared lower half, even elements a
  // shift.
  asm volatile(
      "stmxcsr %[saved]\n\t"
      "ldmxcsr %[own]\n\t"
      "vmovdqu32 (%[a]), %%zmm0\n\t"
      "vmovdqu32 (%[b]), %%zmm1\n\t"
      "vmovdqu32 (%[sums]), %%zmm2\n\t"
      "vpsrld $16, %%zmm0, %%zmm3\n\t"
      "vpsrld $16, %%zmm1, %%zmm4\n\t"
      "vpslld $16, %%zmm3, %%zmm3\n\t"
      "vpslld $16, %%zmm4, %%zmm4\n\t"
      "vfmadd231ps %%zmm4, %%zmm3, %%zmm2\n\t"
      "vpslld $16, %%zmm0, %%zmm0\n\t"
      "vpslld $16, %%zmm1, %%zmm1\n\t"
      "vfmadd231ps %%zmm1, %%zmm0, %%zmm2\n\t"
      "vmovdqu32 %%zmm2, (%[sums])\n\t"
      "ldmxcsr %[saved]"
      : [saved] "=&m"(saved_mxcsr)
      : [own] "m"(kMxcsr), [a] "r"(a), [b] "r"(b), [sums] "r"(sums)
      : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4");
}

uint16_t ConvertToBf16(uint32_t fp32) {
  const uint32_t magnitude = fp32 & 0x7FFFFFFF;
  const uint16_t upper = static_cast<uint16_t>(fp32 >> 16);
  if (magnitude < 0x00800000) return upper & 0x8000;  // zeros and denormals
  if (magnitude > 0x7F800000) return upper | 0x0040;  // NaN: truncated, made quiet
  return static_cast<uint16_t>((fp32 + 0x7FFF + (upper & 1)) >> 16);
}

bool EmulateAvx512Bf16(const DecodedInstruction& decoded, SignalFrame* frame,
                       Instruction* executed) {
  if (!Identify(decoded, executed) || IsReserved(decoded, *executed)) return false;
  const uint64_t mask = decoded.mask == 0 ? ~uint64_t{0} : frame->ReadMask(decoded.mask);
  if (*executed == Instruction::kVdpbf16ps) {
    DotProduct(decoded, mask, frame);
  } else {
    Convert(decoded, *executed == Instruction::kVcvtne2ps2bf16, mask, frame);
  }
  return true;
}

}  // namespace cpumoe::emulator

#endif
