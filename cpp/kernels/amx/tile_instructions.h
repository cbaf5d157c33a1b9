// The tile instructions of AMX.
//
// The compiler's intrinsics do not serve: in GCC 12, _tile_loadconfig and _tile_loadd do not tell
// the compiler that they read memory, so it drops or moves stores just before them. The functions
// here declare every read and write of memory. A tile's number is part of the instruction, and
// therefore a template parameter. The set of instructions is complete, because the emulator's tests
// use those that the kernels do not need.
#pragma once

#include <cstdint>

namespace cpumoe::amx {

inline constexpr int kTileRegisters = 8;
inline constexpr int kMaxRows = 16;
inline constexpr int kMaxRowBytes = 64;

// Operand of LDTILECFG. A tile in use has rows and bytes per row; both are 0 for other tiles.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[2 * kTileRegisters] = {};  // reserved from tile 8 on
  uint8_t rows[2 * kTileRegisters] = {};        // reserved from tile 8 on
};
static_assert(sizeof(TileConfig) == 64);

template <int kTile>
concept TileNumber = kTile >= 0 && kTile < kTileRegisters;

template <int kC, int kA, int kB>
concept ProductTiles =
    TileNumber<kC> && TileNumber<kA> && TileNumber<kB> && kC != kA && kC != kB && kA != kB;

// Gives the calling thread's tiles their shapes, and fills them with zeros.
inline void LoadConfig(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

inline void StoreConfig(TileConfig* config) {
  asm volatile("sttilecfg %0" : "=m"(*config) : : "memory");
}

// Ends the use of tiles. Context switches are cheaper afterwards.
inline void Release() { asm volatile("tilerelease"); }

// Loads a tile. Row i comes from begin + i * stride bytes.
template <int kTile>
  requires TileNumber<kTile>
inline void Load(const void* begin, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(begin), "r"(stride), "i"(kTile) : "memory");
}

// Loads a tile as Load does, with the hint that the data need not be in the nearest cache.
template <int kTile>
  requires TileNumber<kTile>
inline void LoadStream(const void* begin, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
               :
               : "r"(begin), "r"(stride), "i"(kTile)
               : "memory");
}

// Stores a tile. Row i goes to begin + i * stride bytes.
template <int kTile>
  requires TileNumber<kTile>
inline void Store(void* begin, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(begin), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
  requires TileNumber<kTile>
inline void Zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// C [M, N] += A [M, K] x B [K/2, N][2]: fp32 += bf16 x bf16.
template <int kC, int kA, int kB>
  requires ProductTiles<kC, kA, kB>
inline void DotBf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// C [M, N] += A [M, K] x B [K/4, N][4]: int32 += int8 x int8, where S is signed and U unsigned.
template <int kC, int kA, int kB>
  requires ProductTiles<kC, kA, kB>
inline void DotSS() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
  requires ProductTiles<kC, kA, kB>
inline void DotSU() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
  requires ProductTiles<kC, kA, kB>
inline void DotUS() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
  requires ProductTiles<kC, kA, kB>
inline void DotUU() {
  asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace cpumoe::amx
