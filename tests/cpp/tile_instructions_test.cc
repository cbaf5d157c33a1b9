// The wrappers of tile instructions, as an optimising compiler sees them.
//
// GCC 12's intrinsics do not say that they read memory, so stores to a buffer just before them are
// dropped or moved behind them. These tests store to local buffers just before and just after an
// instruction. They are compiled with -O2 in every build.
#include "kernels/amx/tile_instructions.h"

#include <gtest/gtest.h>

#if defined(__x86_64__) && defined(__linux__)

#include <cstdint>
#include <cstring>

#include "dispatch/cpu_features.h"
#include "emulator/emulator.h"

namespace cpumoe::amx {
namespace {

class TileInstructionsTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!emulator::Supports("amx-tile")) GTEST_SKIP() << "this CPU lacks AVX-512F";
    DetectFeatures();  // asks for permission to use AMX, if the CPU has it
    emulator::Install();
  }
  void TearDown() override {
    if (!IsSkipped()) Release();
    emulator::Uninstall();
  }
};

// In the end, tile t has `rows` rows of four bytes if t is even, and one row less if t is odd.
[[gnu::noinline]] void Configure(int rows) {
  TileConfig config;
  for (const int all_rows : {16, rows}) {
    for (int tile = 0; tile < kTileRegisters; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(all_rows - tile % 2);
      config.row_bytes[tile] = 4;
    }
    LoadConfig(config);
  }
}

[[gnu::noinline]] int ConfiguredRows(int tile) {
  TileConfig config = {};
  config.rows[tile] = 99;
  StoreConfig(&config);
  return config.rows[tile];
}

TEST_F(TileInstructionsTest, ConfigurationHasTheStoresBefore) {
  for (const int rows : {5, 9}) {
    Configure(rows);
    for (int tile = 0; tile < kTileRegisters; ++tile)
      EXPECT_EQ(ConfiguredRows(tile), rows - tile % 2);
  }
}

// Uses rows of four bytes. first, first + 1, ... go to tile 0, and their negatives go to tile 1.
template <auto kLoadFirst, auto kLoadSecond>
[[gnu::noinline]] void Fill(int32_t first) {
  int32_t buffer[4];
  for (int row = 0; row < 4; ++row) buffer[row] = first + row;
  kLoadFirst(buffer, sizeof(int32_t));
  for (int row = 0; row < 4; ++row) buffer[row] = -(first + row);
  kLoadSecond(buffer, sizeof(int32_t));
  for (int32_t& row : buffer) row = 0;
}

template <int kTile>
[[gnu::noinline]] int32_t SumOfRows() {
  int32_t buffer[4] = {1000, 1000, 1000, 1000};
  Store<kTile>(buffer, sizeof(int32_t));
  int32_t sum = 0;
  for (const int32_t row : buffer) sum += row;
  return sum;
}

TEST_F(TileInstructionsTest, LoadsAndStoresAreInOrder) {
  TileConfig config;
  for (const int tile : {0, 1}) {
    config.rows[tile] = 4;
    config.row_bytes[tile] = 4;
  }
  LoadConfig(config);
  for (const int32_t first : {7, 100}) {
    const int32_t sum = 4 * first + 6;
    Fill<Load<0>, Load<1>>(first);
    EXPECT_EQ(SumOfRows<0>(), sum);
    EXPECT_EQ(SumOfRows<1>(), -sum);
    Fill<LoadStream<1>, LoadStream<0>>(first);
    EXPECT_EQ(SumOfRows<0>(), -sum);
    EXPECT_EQ(SumOfRows<1>(), sum);
    Zero<0>();
    EXPECT_EQ(SumOfRows<0>(), 0);
  }
}

}  // namespace
}  // namespace cpumoe::amx

#endif
