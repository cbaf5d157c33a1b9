// See amx_tiles.h. Compiled with baseline flags.
//
// TDPBF16PS follows the SDM's pseudocode. For each element of C there are two chains of fused
// multiply-adds, over the even and the odd elements of k, both from +0. Then the chains are added,
// and their sum is added to C. All operations round to nearest even and treat denormals as zero on
// input and output. MXCSR is neither read nor updated.
//
// The arithmetic is AVX-512's own, under an MXCSR of its own, as in avx512_bf16.cc. The SDM leaves
// open which NaN's payload a sum of several NaNs inherits. Here it is the payload that these
// AVX-512 instructions choose.
#include "amx_tiles.h"

#if defined(__x86_64__) && defined(__linux__)

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cpumoe::emulator {
namespace {

constexpr int kTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxRowBytes = 64;

using TileData = uint32_t[kMaxRows][kMaxRowBytes / 4];

struct TileConfig {
  uint8_t bytes[64];  // all zero if not configured

  int Rows(int tile) const { return bytes[48 + tile]; }
  int RowBytes(int tile) const { return bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8; }
};

struct TileFile : TileConfig {
  TileData data[kTiles];
};

// The tiles are in static thread-local storage, because a signal handler must not allocate them on
// first use. There is no second copy on the stack, because stacks for signals may be small.
[[gnu::tls_model("initial-exec")]] thread_local constinit TileFile tiles = {};

struct Encoding {
  uint8_t opcode, prefix;
  bool has_memory;
  Instruction instruction;
};

// All encodings are VEX.128, map 0F38, W0.
constexpr Encoding kEncodings[] = {
    {0x49, kNoPrefix, true, Instruction::kLdtilecfg},
    {0x49, kPrefix66, true, Instruction::kSttilecfg},
    {0x49, kNoPrefix, false, Instruction::kTilerelease},
    {0x49, kPrefixF2, false, Instruction::kTilezero},
    {0x4B, kPrefixF2, true, Instruction::kTileloadd},
    {0x4B, kPrefix66, true, Instruction::kTileloaddt1},
    {0x4B, kPrefixF3, true, Instruction::kTilestored},
    {0x5C, kPrefixF3, false, Instruction::kTdpbf16ps},
    {0x5E, kPrefixF2, false, Instruction::kTdpbssd},
    {0x5E, kPrefixF3, false, Instruction::kTdpbsud},
    {0x5E, kPrefix66, false, Instruction::kTdpbusd},
    {0x5E, kNoPrefix, false, Instruction::kTdpbuud},
};

bool Identify(const DecodedInstruction& decoded, Instruction* instruction) {
  if (!decoded.is_vex || decoded.map != kMap0F38 || decoded.w || decoded.vector_length != 0)
    return false;
  for (const Encoding& encoding : kEncodings) {
    if (encoding.opcode == decoded.opcode && encoding.prefix == decoded.prefix &&
        encoding.has_memory == decoded.has_memory) {
      *instruction = encoding.instruction;
      return true;
    }
  }
  return false;
}

// Refuses encodings of these opcodes that raise #UD even on a CPU with AMX. Also refuses tiles at
// 32-bit addresses, because no code uses them.
bool IsRefused(const DecodedInstruction& decoded, Instruction instruction) {
  if (instruction >= Instruction::kTdpbf16ps) {
    return decoded.reg >= kTiles || decoded.rm >= kTiles || decoded.vvvv >= kTiles;
  }
  if (decoded.vvvv != 0) return true;
  switch (instruction) {
    case Instruction::kLdtilecfg:
    case Instruction::kSttilecfg:
      return decoded.reg != 0;
    case Instruction::kTilerelease:
      return decoded.reg != 0 || decoded.rm != 0;
    case Instruction::kTilezero:
      return decoded.reg >= kTiles || decoded.rm != 0;
    default:
      return decoded.reg >= kTiles || !decoded.memory.has_sib || decoded.memory.address32;
  }
}

// Ends the process with a message. The thread holds no lock of stdio or of the allocator, because a
// tile instruction has trapped.
[[noreturn, gnu::format(printf, 2, 3)]] void Fault(Instruction instruction, const char* format,
                                                   ...) {
  char text[256];
  int length = std::snprintf(text, sizeof(text), "emulator: %s: ", Info(instruction).name);
  va_list arguments;
  va_start(arguments, format);
  length += std::vsnprintf(text + length, sizeof(text) - static_cast<size_t>(length) - 1, format,
                           arguments);
  va_end(arguments);
  text[length++] = '\n';
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text, static_cast<size_t>(length));
  std::abort();
}

void CheckConfig(const TileConfig& loaded) {
  constexpr Instruction kLoad = Instruction::kLdtilecfg;
  const uint8_t* config = loaded.bytes;
  if (config[0] > 1) Fault(kLoad, "palette %d; there are 0 and 1", config[0]);
  if (config[1] != 0) Fault(kLoad, "start row %d; only 0 is emulated", config[1]);
  for (int i = 2; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (reserved && config[i] != 0) Fault(kLoad, "reserved byte %d is %d, not 0", i, config[i]);
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const int rows = loaded.Rows(tile), bytes = loaded.RowBytes(tile);
    if (rows > kMaxRows) Fault(kLoad, "tile %d: %d rows; at most 16", tile, rows);
    if (bytes > kMaxRowBytes) Fault(kLoad, "tile %d: %d bytes per row; at most 64", tile, bytes);
    if ((rows == 0) != (bytes == 0)) {
      Fault(kLoad, "tile %d: %d rows of %d bytes; either both are 0 or none", tile, rows, bytes);
    }
  }
}

void ReleaseTiles() { std::memset(&tiles, 0, sizeof(tiles)); }

void LoadConfig(const void* memory) {
  TileConfig loaded;
  std::memcpy(loaded.bytes, memory, sizeof(loaded.bytes));
  if (loaded.bytes[0] != 0) CheckConfig(loaded);
  ReleaseTiles();
  if (loaded.bytes[0] != 0) std::memcpy(tiles.bytes, loaded.bytes, sizeof(loaded.bytes));
}

void CheckTile(Instruction instruction, int tile) {
  if (tiles.bytes[0] == 0) Fault(instruction, "tiles are not configured");
  if (tiles.Rows(tile) == 0) Fault(instruction, "tile %d is not configured", tile);
  if (instruction != Instruction::kTilezero && tiles.RowBytes(tile) % 4 != 0) {
    Fault(instruction, "tile %d: %d bytes per row; must be a multiple of 4", tile,
          tiles.RowBytes(tile));
  }
}

// Checks the shapes of C [M, N] += A [M, K] x B [K, N], where an element has four bytes.
void CheckProduct(Instruction instruction, int c, int a, int b) {
  if (c == a || c == b || a == b) {
    Fault(instruction, "tiles %d, %d and %d; must be distinct", c, a, b);
  }
  for (const int tile : {c, a, b}) CheckTile(instruction, tile);
  const auto check = [&](const char* what, int x, int in_x, int y, int in_y) {
    if (in_x != in_y) {
      Fault(instruction, "%s is %d in tile %d, but %d in tile %d", what, in_x, x, in_y, y);
    }
  };
  check("M", c, tiles.Rows(c), a, tiles.Rows(a));
  check("N", c, tiles.RowBytes(c) / 4, b, tiles.RowBytes(b) / 4);
  check("K", a, tiles.RowBytes(a) / 4, b, tiles.Rows(b));
}

// Moves the rows of a tile from or to memory at base + displacement + row * (index * scale).
void MoveTile(const DecodedInstruction& decoded, const SignalFrame& frame, Instruction instruction,
              bool to_memory) {
  const int tile = decoded.reg;
  CheckTile(instruction, tile);
  MemoryOperand first = decoded.memory;
  first.index = kNoRegister;
  const uint64_t begin =
      EffectiveAddress(first, 1, frame.rip() + decoded.length, frame.registers());
  const auto stride = static_cast<uint64_t>(ScaledIndex(decoded.memory, frame.registers()));
  const auto row_bytes = static_cast<size_t>(tiles.RowBytes(tile));
  TileData& data = tiles.data[tile];
  if (!to_memory) std::memset(data, 0, sizeof(data));
  for (int row = 0; row < tiles.Rows(tile); ++row) {
    void* memory = reinterpret_cast<void*>(begin + static_cast<uint64_t>(row) * stride);
    if (to_memory) {
      std::memcpy(memory, data[row], row_bytes);
    } else {
      std::memcpy(data[row], memory, row_bytes);
    }
  }
}

// Computes one row of C: c[n] += sum over k of a[k] . b[k][n], where an element is a pair of bf16.
void DotRowBf16(const uint32_t* a, const TileData& b, int64_t depth, uint32_t* c) {
  constexpr uint32_t kMxcsr = 0x9FC0;  // nearest even, exceptions masked, denormals are zero
  uint32_t saved_mxcsr;
  const void* b_row = b;
  asm volatile(
      "stmxcsr %[saved]\n\t"
      "ldmxcsr %[own]\n\t"
      "vpxord %%zmm0, %%zmm0, %%zmm0\n\t"  // even chain
      "vpxord %%zmm1, %%zmm1, %%zmm1\n\t"  // odd chain
      "1:\n\t"
      "vpbroadcastd (%[a]), %%zmm2\n\t"
      "vmovdqu32 (%[b]), %%zmm3\n\t"
      "vpslld $16, %%zmm2, %%zmm4\n\t"
      "vpslld $16, %%zmm3, %%zmm5\n\t"
      "vfmadd231ps %%zmm5, %%zmm4, %%zmm0\n\t"
      "vpsrld $16, %%zmm2, %%zmm2\n\t"
      "vpsrld $16, %%zmm3, %%zmm3\n\t"
      "vpslld $16, %%zmm2, %%zmm2\n\t"
      "vpslld $16, %%zmm3, %%zmm3\n\t"
      "vfmadd231ps %%zmm3, %%zmm2, %%zmm1\n\t"
      "add $4, %[a]\n\t"
      "add $64, %[b]\n\t"
      "dec %[depth]\n\t"
      "jnz 1b\n\t"
      "vaddps %%zmm1, %%zmm0, %%zmm0\n\t"
      "vmovups (%[c]), %%zmm2\n\t"
      "vaddps %%zmm0, %%zmm2, %%zmm2\n\t"
      "vmovups %%zmm2, (%[c])\n\t"
      "ldmxcsr %[saved]"
      : [saved] "=&m"(saved_mxcsr), [a] "+r"(a), [b] "+r"(b_row), [depth] "+r"(depth)
      : [own] "m"(kMxcsr), [c] "r"(c)
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5");
}

uint32_t ByteOf(uint32_t word, int i, bool is_signed) {
  const auto byte = static_cast<uint8_t>(word >> (8 * i));
  return is_signed ? static_cast<uint32_t>(static_cast<int8_t>(byte)) : byte;
}

// Computes one row of C, where an element is four bytes. Sums wrap.
void DotRowInt8(const uint32_t* a, const TileData& b, int64_t depth, bool a_signed, bool b_signed,
                uint32_t* c) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int n = 0; n < kMaxRowBytes / 4; ++n) {
      for (int i = 0; i < 4; ++i) c[n] += ByteOf(a[k], i, a_signed) * ByteOf(b[k][n], i, b_signed);
    }
  }
}

void Dot(const DecodedInstruction& decoded, Instruction instruction) {
  const int c = decoded.reg, a = decoded.rm, b = decoded.vvvv;
  CheckProduct(instruction, c, a, b);
  const int depth = tiles.Rows(b);
  const bool a_signed =
      instruction == Instruction::kTdpbssd || instruction == Instruction::kTdpbsud;
  const bool b_signed =
      instruction == Instruction::kTdpbssd || instruction == Instruction::kTdpbusd;
  for (int row = 0; row < tiles.Rows(c); ++row) {
    uint32_t* sums = tiles.data[c][row];
    if (instruction == Instruction::kTdpbf16ps) {
      DotRowBf16(tiles.data[a][row], tiles.data[b], depth, sums);
    } else {
      DotRowInt8(tiles.data[a][row], tiles.data[b], depth, a_signed, b_signed, sums);
    }
    const int columns = tiles.RowBytes(c) / 4;
    std::memset(sums + columns, 0, static_cast<size_t>(kMaxRowBytes - 4 * columns));
  }
}

void Execute(const DecodedInstruction& decoded, const SignalFrame& frame, Instruction instruction) {
  const auto operand = [&] {
    return reinterpret_cast<void*>(
        EffectiveAddress(decoded.memory, 1, frame.rip() + decoded.length, frame.registers()));
  };
  switch (instruction) {
    case Instruction::kLdtilecfg:
      return LoadConfig(operand());
    case Instruction::kSttilecfg:
      std::memcpy(operand(), tiles.bytes, sizeof(tiles.bytes));
      return;
    case Instruction::kTilerelease:
      return ReleaseTiles();
    case Instruction::kTilezero:
      CheckTile(instruction, decoded.reg);
      std::memset(tiles.data[decoded.reg], 0, sizeof(TileData));
      return;
    case Instruction::kTileloadd:
    case Instruction::kTileloaddt1:
    case Instruction::kTilestored:
      return MoveTile(decoded, frame, instruction, instruction == Instruction::kTilestored);
    default:
      return Dot(decoded, instruction);
  }
}

}  // namespace

bool EmulateAmx(const DecodedInstruction& decoded, const SignalFrame& frame,
                Instruction* executed) {
  if (!Identify(decoded, executed) || IsRefused(decoded, *executed)) return false;
  Execute(decoded, frame, *executed);
  return true;
}

const uint32_t (*TileRows(int tile))[16] { return tiles.data[tile]; }

}  // namespace cpumoe::emulator

#endif
