// Configuration of tiles, loads and stores of tiles, and refused instructions, under the emulator.
#include <gtest/gtest.h>

#if defined(__x86_64__) && defined(__linux__)

#include <algorithm>
#include <csignal>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "dispatch/cpu_features.h"
#include "emulator/emulator.h"
#include "emulator/test_memory.h"
#include "kernels/amx/tile_instructions.h"

namespace cpumoe::emulator {
namespace {

using amx::TileConfig;

bool IsNative() { return TileStateUsable(DetectTileSteps()); }

void SetTile(TileConfig* config, int tile, int rows, int row_bytes) {
  config->rows[tile] = static_cast<uint8_t>(rows);
  config->row_bytes[tile] = static_cast<uint16_t>(row_bytes);
}

TileConfig ConfigOf(int rows, int row_bytes) {
  TileConfig config;
  for (int tile = 0; tile < amx::kTileRegisters; ++tile) SetTile(&config, tile, rows, row_bytes);
  return config;
}

std::vector<uint8_t> Bytes(const void* begin, size_t count) {
  const auto* bytes = static_cast<const uint8_t*>(begin);
  return {bytes, bytes + count};
}

class AmxTilesTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!Supports("amx-tile")) GTEST_SKIP() << "this CPU lacks AVX-512F";
    DetectFeatures();  // asks for permission to use AMX, if the CPU has it
    Install();
    ResetCounts();
    std::iota(data_.begin(), data_.end(), uint8_t{1});
  }
  void TearDown() override {
    if (!IsSkipped()) amx::Release();
    Uninstall();
  }

  std::vector<uint8_t> data_ = std::vector<uint8_t>(4096);
};

TEST_F(AmxTilesTest, ConfigurationIsStored) {
  TileConfig config, stored;
  for (int tile = 0; tile < amx::kTileRegisters; ++tile) SetTile(&config, tile, 2 * tile, 8 * tile);
  amx::LoadConfig(config);
  amx::StoreConfig(&stored);
  EXPECT_EQ(Bytes(&stored, 64), Bytes(&config, 64));
  amx::Release();
  amx::StoreConfig(&stored);
  EXPECT_EQ(Bytes(&stored, 64), std::vector<uint8_t>(64));
  amx::LoadConfig(config);
  TileConfig none = {};
  none.palette = 0;
  amx::LoadConfig(none);
  amx::StoreConfig(&stored);
  EXPECT_EQ(Bytes(&stored, 64), std::vector<uint8_t>(64));
}

TEST_F(AmxTilesTest, ConfiguringAndZeroingClearTiles) {
  std::vector<uint8_t> out(1024, 0xFF);
  amx::LoadConfig(ConfigOf(16, 64));
  amx::Load<4>(data_.data(), 64);
  amx::LoadConfig(ConfigOf(16, 64));
  amx::Store<4>(out.data(), 64);
  EXPECT_EQ(out, std::vector<uint8_t>(1024));
  amx::Load<4>(data_.data(), 64);
  amx::Load<5>(data_.data(), 64);
  amx::Zero<4>();
  amx::Store<4>(out.data(), 64);
  EXPECT_EQ(out, std::vector<uint8_t>(1024));
  amx::Store<5>(out.data(), 64);
  EXPECT_EQ(out, Bytes(data_.data(), 1024));
}

TEST_F(AmxTilesTest, RowsAndBytesOfEveryShape) {
  for (int rows = 1; rows <= 16; ++rows) {
    for (int row_bytes = 4; row_bytes <= 64; row_bytes += 4) {
      const int in_stride = 68, out_stride = -72;
      std::vector<uint8_t> out(2048, 0xEE), expected = out;
      amx::LoadConfig(ConfigOf(rows, row_bytes));
      amx::Load<1>(data_.data(), in_stride);
      uint8_t* first = out.data() + 15 * 72;
      amx::Store<1>(first, out_stride);
      for (int row = 0; row < rows; ++row) {
        std::copy_n(&data_[row * in_stride], row_bytes, &expected[(15 - row) * 72]);
      }
      ASSERT_EQ(out, expected) << rows << " x " << row_bytes;
    }
  }
}

// Loads tile 3 with several forms of address. All forms mean `base` and a stride of 64 bytes,
// except forms without an index.
#define CPUMOE_LOAD_AT(base, displacement, scale, base_register, index_register, operand)          \
  asm volatile("mov %0, %%" base_register "\n\tmov %1, %%" index_register "\n\ttileloadd " operand \
               ", %%tmm3"                                                                          \
               :                                                                                   \
               : "a"((base) - (displacement)), "d"(int64_t{64 / (scale)})                          \
               : "memory", base_register, index_register)

void LoadFromStack(const uint8_t* base) {
  asm volatile(
      "sub $1280, %%rsp\n\tlea 64(%%rsp), %%rdi\n\tmov $1024, %%ecx\n\trep movsb\n\t"
      "mov $16, %%ecx\n\ttileloadd 64(%%rsp,%%rcx,4), %%tmm3\n\tadd $1280, %%rsp"
      : "+S"(base)
      :
      : "rdi", "rcx", "memory", "cc");
}

TEST_F(AmxTilesTest, Addresses) {
  const uint8_t* base = data_.data() + 1024;
  const std::vector<uint8_t> expected = Bytes(base, 1024);
  amx::LoadConfig(ConfigOf(16, 64));
  const auto loaded = [] {
    std::vector<uint8_t> out(1024);
    amx::Store<3>(out.data(), 64);
    amx::Zero<3>();
    return out;
  };
  CPUMOE_LOAD_AT(base, 0, 1, "rsi", "rcx", "(%%rsi,%%rcx,1)");
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, 127, 2, "r12", "r9", "127(%%r12,%%r9,2)");
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, -128, 4, "r14", "rdi", "-128(%%r14,%%rdi,4)");
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, -4096, 8, "r13", "r15", "-4096(%%r13,%%r15,8)");
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, 0, 8, "r15", "r12", "(%%r15,%%r12,8)");
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, 0, 1, "r13", "r10", "(%%r13,%%r10,1)");
  EXPECT_EQ(loaded(), expected);
  LoadFromStack(base);
  EXPECT_EQ(loaded(), expected);
  CPUMOE_LOAD_AT(base, 0, 1, "r12", "rcx", "(%%r12)");
  for (int row = 0; row < 16; ++row) std::copy_n(base, 64, data_.begin() + 2048 + row * 64);
  EXPECT_EQ(loaded(), Bytes(&data_[2048], 1024));
}

TEST_F(AmxTilesTest, ARunOfInstructionsIsOneTrap) {
  if (IsNative()) GTEST_SKIP() << "this CPU has AMX, nothing traps";
  amx::LoadConfig(ConfigOf(16, 64));
  ResetCounts();
  asm volatile(
      "tilezero %%tmm0\n\ttileloadd (%0,%1,1), %%tmm1\n\ttileloaddt1 (%0,%1,1), %%tmm2\n\t"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\ttdpbssd %%tmm2, %%tmm1, %%tmm0\n\t"
      "nop\n\ttilerelease"
      :
      : "r"(data_.data()), "r"(int64_t{64})
      : "memory");
  EXPECT_EQ(Traps(), 2);
  EXPECT_EQ(Count(Instruction::kTilezero), 1);
  EXPECT_EQ(Count(Instruction::kTileloadd), 1);
  EXPECT_EQ(Count(Instruction::kTileloaddt1), 1);
  EXPECT_EQ(Count(Instruction::kTdpbf16ps), 1);
  EXPECT_EQ(Count(Instruction::kTdpbssd), 1);
  EXPECT_EQ(Count(Instruction::kTilerelease), 1);
  EXPECT_EQ(Count(Instruction::kTilestored), 0);
}

class AmxTilesDeathTest : public AmxTilesTest {
 protected:
  void SetUp() override {
    AmxTilesTest::SetUp();
    if (!IsSkipped() && IsNative()) GTEST_SKIP() << "this CPU has AMX, and no messages";
  }
};

void LoadBytes(int byte, int value) {
  TileConfig config;
  reinterpret_cast<uint8_t*>(&config)[byte] = static_cast<uint8_t>(value);
  amx::LoadConfig(config);
}

TEST_F(AmxTilesDeathTest, Configurations) {
  EXPECT_DEATH(LoadBytes(0, 2), "emulator: ldtilecfg: palette 2; there are 0 and 1");
  EXPECT_DEATH(LoadBytes(1, 3), "start row 3; only 0 is emulated");
  for (const int reserved : {2, 15, 32, 47, 56, 63}) {
    EXPECT_DEATH(LoadBytes(reserved, 9),
                 "reserved byte " + std::to_string(reserved) + " is 9, not 0");
  }
  EXPECT_DEATH(amx::LoadConfig(ConfigOf(17, 64)), "tile 0: 17 rows; at most 16");
  EXPECT_DEATH(amx::LoadConfig(ConfigOf(16, 68)), "tile 0: 68 bytes per row; at most 64");
  EXPECT_DEATH(LoadBytes(49, 16), "tile 1: 16 rows of 0 bytes; either both are 0 or none");
  EXPECT_DEATH(LoadBytes(30, 64), "tile 7: 0 rows of 64 bytes; either both are 0 or none");
}

TEST_F(AmxTilesDeathTest, UseOfTilesThatAreNotConfigured) {
  EXPECT_DEATH(amx::Zero<0>(), "emulator: tilezero: tiles are not configured");
  TileConfig config;
  SetTile(&config, 0, 4, 16);
  SetTile(&config, 1, 4, 6);
  amx::LoadConfig(config);
  EXPECT_DEATH(amx::Load<2>(data_.data(), 64), "tileloadd: tile 2 is not configured");
  EXPECT_DEATH(amx::Store<2>(data_.data(), 64), "tilestored: tile 2 is not configured");
  EXPECT_DEATH(amx::LoadStream<1>(data_.data(), 64),
               "tileloaddt1: tile 1: 6 bytes per row; must be a multiple of 4");
}

TEST_F(AmxTilesDeathTest, ShapesOfProducts) {
  const auto dot = [](int c_rows, int c_bytes, int a_rows, int a_bytes, int b_rows, int b_bytes) {
    TileConfig config;
    SetTile(&config, 0, c_rows, c_bytes);
    SetTile(&config, 1, a_rows, a_bytes);
    SetTile(&config, 2, b_rows, b_bytes);
    amx::LoadConfig(config);
    amx::DotBf16<0, 1, 2>();
  };
  dot(3, 20, 3, 28, 7, 20);
  EXPECT_DEATH(dot(3, 20, 4, 28, 7, 20), "tdpbf16ps: M is 3 in tile 0, but 4 in tile 1");
  EXPECT_DEATH(dot(3, 20, 3, 28, 7, 24), "tdpbf16ps: N is 5 in tile 0, but 6 in tile 2");
  EXPECT_DEATH(dot(3, 20, 3, 32, 7, 20), "tdpbf16ps: K is 8 in tile 1, but 7 in tile 2");
  EXPECT_DEATH(dot(3, 20, 3, 28, 0, 0), "tdpbf16ps: tile 2 is not configured");
  EXPECT_DEATH(dot(3, 20, 3, 27, 7, 20), "tile 1: 27 bytes per row; must be a multiple of 4");
  amx::LoadConfig(ConfigOf(16, 64));
  EXPECT_DEATH(Execute({0xC4, 0xE2, 0x73, 0x5E, 0xC1}),  // no assembler writes this
               "tdpbssd: tiles 0, 1 and 1; must be distinct");
}

TEST_F(AmxTilesDeathTest, MemoryFaults) {
  Arena arena;
  amx::LoadConfig(ConfigOf(16, 64));
  amx::Load<0>(arena.end() - 1024, 64);
  const auto run = [&] {
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer's handler would turn the signal into an exit
    amx::Load<0>(arena.end() - 1020, 64);
  };
  EXPECT_EXIT(run(), testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(AmxTilesDeathTest, ReservedEncodingsKill) {
  amx::LoadConfig(ConfigOf(16, 64));
  Execute({0xC4, 0xE2, 0x6A, 0x5C, 0xC1});  // tdpbf16ps %tmm2, %tmm1, %tmm0
  const std::vector<std::vector<uint8_t>> reserved = {
      {0xC4, 0xE2, 0x6E, 0x5C, 0xC1},  // L
      {0xC4, 0xE2, 0xEA, 0x5C, 0xC1},  // W
      {0xC4, 0x62, 0x6A, 0x5C, 0xC1},  // tile 8, encoded in three ways
      {0xC4, 0xC2, 0x6A, 0x5C, 0xC1},       {0xC4, 0xE2, 0x3A, 0x5C, 0xC1},
      {0xC4, 0xE2, 0x6A, 0x5C, 0x01},        // a product with memory
      {0xC4, 0xE2, 0x69, 0x5C, 0xC1},        // prefix 66
      {0xC4, 0xE2, 0x78, 0x49, 0xC1},        // tilerelease with an operand
      {0xC4, 0xE2, 0x78, 0x49, 0x08},        // ldtilecfg with another opcode extension
      {0xC4, 0xE2, 0x7B, 0x4B, 0x00},        // tileloadd without SIB
      {0xC4, 0xE2, 0x73, 0x4B, 0x04, 0x08},  // tileloadd with a second source
  };
  for (const std::vector<uint8_t>& bytes : reserved) {
    EXPECT_EXIT(Execute(bytes), testing::KilledBySignal(SIGILL), "");
  }
}

}  // namespace
}  // namespace cpumoe::emulator

#endif
