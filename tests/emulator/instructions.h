// The instructions that the emulator executes.
#pragma once

#include <iterator>

namespace cpumoe::emulator {

enum class Instruction {
  kVpdpbusd,  // in its VEX encoding
  kVdpbf16ps,
  kVcvtneps2bf16,
  kVcvtne2ps2bf16,
  kLdtilecfg,
  kSttilecfg,
  kTilerelease,
  kTilezero,
  kTileloadd,
  kTileloaddt1,
  kTilestored,
  kTdpbf16ps,  // from here on, all are products of tiles
  kTdpbssd,
  kTdpbsud,
  kTdpbusd,
  kTdpbuud,
};

struct InstructionInfo {
  const char* name;
  const char* feature;  // the compiler's name of the feature
  // Variants for the feature multiply by this instruction. If it was counted, their code ran.
  bool is_evidence;
};

inline constexpr InstructionInfo kInstructions[] = {
    {"vpdpbusd", "avxvnni", true},          {"vdpbf16ps", "avx512bf16", true},
    {"vcvtneps2bf16", "avx512bf16", false}, {"vcvtne2ps2bf16", "avx512bf16", false},
    {"ldtilecfg", "amx-tile", false},       {"sttilecfg", "amx-tile", false},
    {"tilerelease", "amx-tile", false},     {"tilezero", "amx-tile", false},
    {"tileloadd", "amx-tile", false},       {"tileloaddt1", "amx-tile", false},
    {"tilestored", "amx-tile", false},      {"tdpbf16ps", "amx-bf16", true},
    {"tdpbssd", "amx-int8", false},         {"tdpbsud", "amx-int8", false},
    {"tdpbusd", "amx-int8", false},         {"tdpbuud", "amx-int8", false},
};
inline constexpr int kNumInstructions = static_cast<int>(std::size(kInstructions));
static_assert(kNumInstructions == static_cast<int>(Instruction::kTdpbuud) + 1);

constexpr const InstructionInfo& Info(Instruction instruction) {
  return kInstructions[static_cast<int>(instruction)];
}

}  // namespace cpumoe::emulator
