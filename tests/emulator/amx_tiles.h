// AMX: the tile instructions of AMX-TILE, AMX-BF16 and AMX-INT8 (SDM volume 1, chapter 18, and
// volume 2).
//
// Each thread has tile registers of its own. The configuration is LDTILECFG's operand:
//
//   byte  0        palette: 1, or 0 for no tiles
//         1        start row, where an interrupted load resumes; only 0 is emulated
//        16 + 2 t  bytes per row of tile t, t = 0..7, at most 64
//        48 + t    rows of tile t, at most 16
//   and zeros elsewhere.
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <cstdint>

#include "instructions.h"
#include "signal_frame.h"
#include "x86_decode.h"

namespace cpumoe::emulator {

// Executes `decoded` for the calling thread, except for moving RIP, and sets `executed`. Returns
// false, with no effect, if `decoded` is none of these instructions or has an encoding that the CPU
// would refuse. An instruction that the CPU would refuse because of the configuration or of shapes
// ends the process.
bool EmulateAmx(const DecodedInstruction& decoded, const SignalFrame& frame, Instruction* executed);

// All 16 rows of 64 bytes of a tile of the calling thread, including those outside the tile's
// shape, which no instruction shows.
const uint32_t (*TileRows(int tile))[16];

}  // namespace cpumoe::emulator

#endif
