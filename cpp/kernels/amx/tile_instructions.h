// The tile instructions of AMX.
//
// Not the compiler's intrinsics: GCC 12's _tile_loadconfig and _tile_loadd do not tell the compiler
// that they read memory, so that it drops or moves the stores to it just before. Here whatever
// reads or writes memory says so. A tile's number is part of the instruction, hence a template
// parameter. The set is complete: what the kernels do not use, the emulator's tests do.
#pragma once

#include <cstdint>

namespace cpumoe::amx {

inline constexpr int kTileRegisters = 8;
inline constexpr int kMaxRows = 16;
inline constexpr int kMaxRowBytes = 64;

// Operand of LDTILECFG. A tile that is used has both rows and bytes per row; others neither.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[2 * kTileRegisters] = {};  // from tile 8 on reserved
  uint8_t rows[2 * kTileRegisters] = {};        // from tile 8 on reserved
};
static_assert(sizeof(TileConfig) == 64);

template <int kTile>
concept TileNumber = kTile >= 0 && kTile < kTileRegisters;

template <int kC, int kA, int kB>
concept ProductTiles =
    TileNumber<kC> && TileNumber<kA> && TileNumber<kB> && kC != kA && kC != kB && kA != kB;

// Gives the calling thread's tiles their shapes, and zeros.
inline void LoadConfig(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

inline void StoreConfig(TileConfig* config) {
  asm volatile("sttilecfg %0" : "=m"(*config) : : "memory");
}

// Ends the use of tiles: context switches are cheaper without.
inline void Release() { asm volatile("tilerelease"); }

// Row i comes from begin + i * stride bytes.
template <int kTile>
  requires TileNumber<kTile>
inline void Load(const void* begin, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(begin), "r"(stride), "i"(kTile) : "memory");
}

// The same with the hint that the data need not be in the nearest cache.
template <int kTile>
  requires TileNumber<kTile>
inline void LoadStream(const void* begin, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
               :
               : "r"(begin), "r"(stride), "i"(kTile)
               : "memory");
}

// Row i goes to begin + i * stride bytes.
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
