// See x86_decode.h.
#include "x86_decode.h"

#if defined(__x86_64__) && defined(__linux__)

#include <asm/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace cpumoe::emulator {
namespace {

constexpr int kMaxLength = 15;

// Register bits that a prefix adds to the fields of ModRM and SIB.
struct RegisterExtension {
  int reg, index, base;   // each is 0 or 8
  int reg_high, rm_high;  // each is 0 or 16
};

class ByteReader {
 public:
  explicit ByteReader(const uint8_t* begin) : begin_(begin), next_(begin) {}

  uint8_t Byte() { return *next_++; }

  int32_t Dword() {
    uint32_t value = 0;
    for (int shift = 0; shift < 32; shift += 8) value |= static_cast<uint32_t>(Byte()) << shift;
    return static_cast<int32_t>(value);
  }

  int length() const { return static_cast<int>(next_ - begin_); }

 private:
  const uint8_t* begin_;
  const uint8_t* next_;
};

// Reads legacy prefixes and returns the byte that follows. Prefixes that VEX and EVEX forbid (66,
// F2, F3, LOCK, REX) are returned, too, and then match nothing.
uint8_t ReadLegacyPrefixes(ByteReader* reader, MemoryOperand* memory) {
  while (reader->length() < kMaxLength) {
    const uint8_t byte = reader->Byte();
    switch (byte) {
      case 0x26:
      case 0x2E:
      case 0x36:
      case 0x3E:  // ES, CS, SS and DS have base 0
        memory->segment = Segment::kFlat;
        break;
      case 0x64:
        memory->segment = Segment::kFs;
        break;
      case 0x65:
        memory->segment = Segment::kGs;
        break;
      case 0x67:
        memory->address32 = true;
        break;
      default:
        return byte;
    }
  }
  return 0;
}

// Reads the three bytes after 62:
//   P0 = R' X' B' R2' 0 m m m     P1 = W v v v v 1 p p     P2 = z L L b V' a a a
// where R, X, B, R2, V and vvvv are stored inverted.
bool ReadEvexPayload(ByteReader* reader, DecodedInstruction* instruction,
                     RegisterExtension* extension) {
  const uint8_t p0 = reader->Byte();
  const uint8_t p1 = reader->Byte();
  const uint8_t p2 = reader->Byte();
  if ((p0 & 0x08) != 0 || (p1 & 0x04) == 0) return false;
  extension->reg = (p0 & 0x80) != 0 ? 0 : 8;
  extension->index = (p0 & 0x40) != 0 ? 0 : 8;
  extension->base = (p0 & 0x20) != 0 ? 0 : 8;
  extension->reg_high = (p0 & 0x10) != 0 ? 0 : 16;
  extension->rm_high = extension->index * 2;
  instruction->map = p0 & 7;
  instruction->w = (p1 & 0x80) != 0;
  instruction->prefix = p1 & 3;
  instruction->vvvv = static_cast<uint8_t>((~p1 >> 3 & 15) | ((p2 & 0x08) != 0 ? 0 : 16));
  instruction->zeroing = (p2 & 0x80) != 0;
  instruction->vector_length = p2 >> 5 & 3;
  instruction->broadcast = (p2 & 0x10) != 0;
  instruction->mask = p2 & 7;
  return true;
}

// Reads the byte after C5:
//   P0 = R' v v v v L p p
// where R and vvvv are stored inverted; the map is 0F.
void ReadShortVexPayload(ByteReader* reader, DecodedInstruction* instruction,
                         RegisterExtension* extension) {
  const uint8_t p0 = reader->Byte();
  *extension = {
      .reg = (p0 & 0x80) != 0 ? 0 : 8, .index = 0, .base = 0, .reg_high = 0, .rm_high = 0};
  instruction->is_vex = true;
  instruction->map = kMap0F;
  instruction->vvvv = ~p0 >> 3 & 15;
  instruction->vector_length = p0 >> 2 & 1;
  instruction->prefix = p0 & 3;
}

// Reads the two bytes after C4:
//   P0 = R' X' B' m m m m m     P1 = W v v v v L p p
// where R, X, B and vvvv are stored inverted.
bool ReadVexPayload(ByteReader* reader, DecodedInstruction* instruction,
                    RegisterExtension* extension) {
  const uint8_t p0 = reader->Byte();
  const uint8_t p1 = reader->Byte();
  *extension = {.reg = (p0 & 0x80) != 0 ? 0 : 8,
                .index = (p0 & 0x40) != 0 ? 0 : 8,
                .base = (p0 & 0x20) != 0 ? 0 : 8,
                .reg_high = 0,
                .rm_high = 0};
  instruction->is_vex = true;
  instruction->map = p0 & 31;
  instruction->w = (p1 & 0x80) != 0;
  instruction->vvvv = ~p1 >> 3 & 15;
  instruction->vector_length = p1 >> 2 & 1;
  instruction->prefix = p1 & 3;
  return instruction->map == kMap0F || instruction->map == kMap0F38;  // map 3 has immediate bytes
}

void ReadMemoryOperand(ByteReader* reader, int mod, int rm, const RegisterExtension& extension,
                       MemoryOperand* memory) {
  bool displacement32 = mod == 2;
  memory->base = rm | extension.base;
  if (rm == 4) {
    const uint8_t sib = reader->Byte();
    memory->has_sib = true;
    const int index = (sib >> 3 & 7) | extension.index;
    memory->scale = 1 << (sib >> 6);
    if (index != 4) memory->index = index;
    memory->base = (sib & 7) | extension.base;
    if ((sib & 7) == 5 && mod == 0) {
      memory->base = kNoRegister;
      displacement32 = true;
    }
  } else if (rm == 5 && mod == 0) {
    memory->base = kRip;
    displacement32 = true;
  }
  if (displacement32) {
    memory->displacement = reader->Dword();
  } else if (mod == 1) {
    memory->displacement = static_cast<int8_t>(reader->Byte());
    memory->displacement_is_byte = true;
  }
}

void ReadModRm(ByteReader* reader, const RegisterExtension& extension,
               DecodedInstruction* instruction) {
  const uint8_t modrm = reader->Byte();
  const int mod = modrm >> 6;
  const int rm = modrm & 7;
  instruction->reg = static_cast<uint8_t>((modrm >> 3 & 7) | extension.reg | extension.reg_high);
  if (mod == 3) {
    instruction->rm = static_cast<uint8_t>(rm | extension.base | extension.rm_high);
  } else {
    instruction->has_memory = true;
    ReadMemoryOperand(reader, mod, rm, extension, &instruction->memory);
  }
}

uint64_t GeneralRegister(const mcontext_t& registers, int number) {
  static constexpr int kIndex[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(registers.gregs[kIndex[number]]);
}

uint64_t SegmentBase(Segment segment) {
  if (segment == Segment::kFlat) return 0;
  // The frame does not hold the FS and GS bases, but the handler runs on the thread that trapped.
  uint64_t base = 0;
  syscall(SYS_arch_prctl, segment == Segment::kFs ? ARCH_GET_FS : ARCH_GET_GS, &base);
  return base;
}

}  // namespace

bool Decode(const uint8_t* code, DecodedInstruction* instruction) {
  ByteReader reader(code);
  *instruction = DecodedInstruction();
  RegisterExtension extension;
  switch (ReadLegacyPrefixes(&reader, &instruction->memory)) {
    case 0x62:
      if (!ReadEvexPayload(&reader, instruction, &extension)) return false;
      break;
    case 0xC4:
      if (!ReadVexPayload(&reader, instruction, &extension)) return false;
      break;
    case 0xC5:
      ReadShortVexPayload(&reader, instruction, &extension);
      break;
    default:
      return false;
  }
  instruction->opcode = reader.Byte();
  constexpr uint8_t kVzeroupper = 0x77;  // has no ModRM
  if (instruction->is_vex && instruction->map == kMap0F && instruction->opcode == kVzeroupper) {
    return false;
  }
  ReadModRm(&reader, extension, instruction);
  instruction->length = static_cast<uint8_t>(reader.length());
  return reader.length() <= kMaxLength;
}

int64_t ScaledIndex(const MemoryOperand& memory, const mcontext_t& registers) {
  if (memory.index == kNoRegister) return 0;
  return static_cast<int64_t>(GeneralRegister(registers, memory.index) *
                              static_cast<uint64_t>(memory.scale));
}

uint64_t EffectiveAddress(const MemoryOperand& memory, int displacement_unit, uint64_t next_rip,
                          const mcontext_t& registers) {
  const int64_t unit = memory.displacement_is_byte ? displacement_unit : 1;
  uint64_t address = static_cast<uint64_t>(memory.displacement * unit);
  if (memory.base == kRip) {
    address += next_rip;
  } else if (memory.base != kNoRegister) {
    address += GeneralRegister(registers, memory.base);
  }
  address += static_cast<uint64_t>(ScaledIndex(memory, registers));
  if (memory.address32) address &= 0xFFFFFFFF;
  return address + SegmentBase(memory.segment);
}

}  // namespace cpumoe::emulator

#endif
