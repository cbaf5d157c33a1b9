// See avx_vnni.h. Compiled with baseline flags.
#include "avx_vnni.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cpumoe::emulator {
namespace {

size_t VectorBytes(const DecodedInstruction& decoded) {
  return size_t{16} << decoded.vector_length;
}

uint64_t AddressOf(const DecodedInstruction& decoded, const SignalFrame& frame) {
  return EffectiveAddress(decoded.memory, /*displacement_unit=*/1, frame.rip() + decoded.length,
                          frame.registers());
}

}  // namespace

bool EmulateAvxVnni(const DecodedInstruction& decoded, SignalFrame* frame, Instruction* executed) {
  if (!decoded.is_vex || decoded.map != kMap0F38 || decoded.prefix != kPrefix66 ||
      decoded.opcode != 0x50 || decoded.w) {
    return false;
  }
  *executed = Instruction::kVpdpbusd;
  const int num_lanes = 4 << decoded.vector_length;
  uint32_t a[16], b[16] = {}, sums[16];
  if (decoded.has_memory) {
    std::memcpy(b, reinterpret_cast<const void*>(AddressOf(decoded, *frame)), VectorBytes(decoded));
  } else {
    frame->ReadVector(decoded.rm, b);
  }
  frame->ReadVector(decoded.vvvv, a);
  frame->ReadVector(decoded.reg, sums);
  for (int lane = 0; lane < 16; ++lane) {
    if (lane >= num_lanes) {
      sums[lane] = 0;
      continue;
    }
    for (int shift = 0; shift < 32; shift += 8) {
      const int x = a[lane] >> shift & 0xFF;
      const int y = static_cast<int8_t>(b[lane] >> shift & 0xFF);
      sums[lane] += static_cast<uint32_t>(x * y);
    }
  }
  frame->WriteVector(decoded.reg, sums);
  return true;
}

bool EmulateLoad(const DecodedInstruction& decoded, SignalFrame* frame) {
  if (!decoded.is_vex || !decoded.has_memory || decoded.vvvv != 0) return false;
  const bool broadcast = decoded.map == kMap0F38 && decoded.opcode == 0x58 &&
                         decoded.prefix == kPrefix66 && !decoded.w;
  const bool is_move = decoded.map == kMap0F && decoded.opcode == 0x6F;
  const bool aligned = is_move && decoded.prefix == kPrefix66;
  if (!broadcast && !aligned && !(is_move && decoded.prefix == kPrefixF3)) return false;
  const uint64_t address = AddressOf(decoded, *frame);
  const size_t bytes = VectorBytes(decoded);
  if (aligned && address % bytes != 0) return false;  // the CPU itself must refuse it
  const auto* memory = reinterpret_cast<const std::byte*>(address);
  uint32_t lanes[16] = {};
  if (broadcast) {
    for (size_t i = 0; i < bytes / 4; ++i) std::memcpy(&lanes[i], memory, 4);
  } else {
    std::memcpy(lanes, memory, bytes);
  }
  frame->WriteVector(decoded.reg, lanes);
  return true;
}

}  // namespace cpumoe::emulator

#endif
