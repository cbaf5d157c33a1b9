// Compares the emulated tile instructions with a scalar model, bit for bit.
//
// On a CPU with AMX these tests run the real instructions, which proves the model.
#include <gtest/gtest.h>

#if defined(__x86_64__) && defined(__linux__)

#include <xmmintrin.h>

#include <bit>
#include <csignal>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "dispatch/cpu_features.h"
#include "emulator/amx_tiles.h"
#include "emulator/bf16_test_arithmetic.h"
#include "emulator/emulator.h"
#include "emulator/test_memory.h"
#include "kernels/amx/tile_instructions.h"

namespace cpumoe::emulator {
namespace {

using amx::TileConfig;
using Words = std::vector<uint32_t>;

bool IsNative() { return TileStateUsable(DetectTileSteps()); }

// C [m, n] += A [m, k] x B [k, n], where an element has four bytes.
struct Shape {
  int m, n, k;
};

struct Operands {
  Words a, b, c;
};

void SetTile(TileConfig* config, int tile, int rows, int columns) {
  config->rows[tile] = static_cast<uint8_t>(rows);
  config->row_bytes[tile] = static_cast<uint16_t>(4 * columns);
}

bool OutsideIsZero(int tile, int rows, int columns) {
  const auto* data = TileRows(tile);
  for (int i = 0; i < 256; ++i) {
    if ((i / 16 >= rows || i % 16 >= columns) && data[i / 16][i % 16] != 0) return false;
  }
  return true;
}

template <Instruction kDot, int kC, int kA, int kB>
void Multiply(const Shape& s, Operands* o) {
  TileConfig config;
  SetTile(&config, kC, s.m, s.n);
  SetTile(&config, kA, s.m, s.k);
  SetTile(&config, kB, s.k, s.n);
  amx::LoadConfig(config);
  amx::Load<kC>(o->c.data(), 4 * s.n);
  amx::Load<kA>(o->a.data(), 4 * s.k);
  amx::LoadStream<kB>(o->b.data(), 4 * s.n);
  if constexpr (kDot == Instruction::kTdpbf16ps) amx::DotBf16<kC, kA, kB>();
  if constexpr (kDot == Instruction::kTdpbssd) amx::DotSS<kC, kA, kB>();
  if constexpr (kDot == Instruction::kTdpbsud) amx::DotSU<kC, kA, kB>();
  if constexpr (kDot == Instruction::kTdpbusd) amx::DotUS<kC, kA, kB>();
  if constexpr (kDot == Instruction::kTdpbuud) amx::DotUU<kC, kA, kB>();
  amx::Store<kC>(o->c.data(), 4 * s.n);
  if (!IsNative()) {
    EXPECT_TRUE(OutsideIsZero(kC, s.m, s.n) && OutsideIsZero(kA, s.m, s.k));
  }
  amx::Release();
}

struct Form {
  Instruction instruction;
  void (*multiply[3])(const Shape&, Operands*);  // three forms with different tiles
};

template <Instruction kDot>
constexpr Form kForm = {
    kDot, {Multiply<kDot, 0, 1, 2>, Multiply<kDot, 7, 6, 5>, Multiply<kDot, 3, 0, 7>}};
const Form kForms[] = {kForm<Instruction::kTdpbf16ps>, kForm<Instruction::kTdpbssd>,
                       kForm<Instruction::kTdpbsud>, kForm<Instruction::kTdpbusd>,
                       kForm<Instruction::kTdpbuud>};

uint32_t ModelAdd(uint32_t x, uint32_t y) { return ModelFma(x, 0x3F800000, y); }

uint32_t ModelBf16(const Shape& s, const Operands& o, int m, int n) {
  uint32_t even = 0, odd = 0;
  for (int k = 0; k < s.k; ++k) {
    const uint32_t a = o.a[m * s.k + k], b = o.b[k * s.n + n];
    even = ModelFma(a << 16, b << 16, even);
    odd = ModelFma(a & 0xFFFF0000, b & 0xFFFF0000, odd);
  }
  return ModelAdd(o.c[m * s.n + n], ModelAdd(even, odd));
}

uint32_t ModelInt8(Instruction form, const Shape& s, const Operands& o, int m, int n) {
  const bool a_signed = form == Instruction::kTdpbssd || form == Instruction::kTdpbsud;
  const bool b_signed = form == Instruction::kTdpbssd || form == Instruction::kTdpbusd;
  int64_t sum = o.c[m * s.n + n];
  for (int i = 0; i < 4 * s.k; ++i) {
    const uint32_t a = o.a[m * s.k + i / 4] >> 8 * (i % 4) & 0xFF;
    const uint32_t b = o.b[i / 4 * s.n + n] >> 8 * (i % 4) & 0xFF;
    const int64_t x = a_signed && a > 127 ? int64_t{a} - 256 : a;
    const int64_t y = b_signed && b > 127 ? int64_t{b} - 256 : b;
    sum += x * y;
  }
  return static_cast<uint32_t>(sum);
}

Words Model(Instruction form, const Shape& s, const Operands& o) {
  Words c(o.c.size());
  for (int m = 0; m < s.m; ++m) {
    for (int n = 0; n < s.n; ++n) {
      c[m * s.n + n] =
          form == Instruction::kTdpbf16ps ? ModelBf16(s, o, m, n) : ModelInt8(form, s, o, m, n);
    }
  }
  return c;
}

// Returns finite numbers of moderate size. Sums of them need rounding.
uint32_t ModerateLane(Rng& rng) {
  const auto bits = static_cast<uint32_t>(rng());
  return (bits & 0x807F807F) | (120 + (bits >> 8 & 7)) << 23 | (120 + (bits >> 24 & 7)) << 7;
}

Operands RandomOperands(const Shape& s, bool moderate, Rng& rng) {
  Operands o = {Words(s.m * s.k), Words(s.k * s.n), Words(s.m * s.n)};
  for (Words* words : {&o.a, &o.b, &o.c}) {
    for (uint32_t& word : *words) word = moderate ? ModerateLane(rng) : RandomLane(rng);
  }
  return o;
}

Operands RandomBytes(const Shape& s, Rng& rng) {
  Operands o = {Words(s.m * s.k), Words(s.k * s.n), Words(s.m * s.n)};
  for (Words* words : {&o.a, &o.b, &o.c}) {
    for (uint32_t& word : *words) word = static_cast<uint32_t>(rng());
  }
  return o;
}

void CheckProducts(const Form& form, int count, Rng& rng) {
  const auto up_to_16 = [&] { return static_cast<int>(1 + rng() % 16); };
  for (int i = 0; i < count; ++i) {
    // With few terms, not all sums of special values are NaN.
    const Shape s = {up_to_16(), up_to_16(), i % 3 == 0 ? 1 + i % 2 : up_to_16()};
    const Operands in = form.instruction == Instruction::kTdpbf16ps
                            ? RandomOperands(s, i % 3 == 1, rng)
                            : RandomBytes(s, rng);
    Operands out = in;
    form.multiply[i % 3](s, &out);
    const Words expected = Model(form.instruction, s, in);
    for (size_t j = 0; j < expected.size(); ++j) {
      ASSERT_EQ(out.c[j], expected[j])
          << Info(form.instruction).name << std::hex << " C " << in.c[j] << std::dec << ", m "
          << j / s.n << " of " << s.m << ", n " << j % s.n << " of " << s.n << ", K " << s.k;
    }
  }
}

class AmxEmulatorTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!Supports("amx-tile")) GTEST_SKIP() << "this CPU lacks AVX-512F";
    DetectFeatures();  // asks for permission to use AMX, if the CPU has it
    Install();
    ResetCounts();
  }
  void TearDown() override { Uninstall(); }

  Rng rng_{20240608};
};

class AmxProductTest : public AmxEmulatorTest, public testing::WithParamInterface<Form> {};
INSTANTIATE_TEST_SUITE_P(Forms, AmxProductTest, testing::ValuesIn(kForms), [](const auto& test) {
  return std::string(Info(test.param.instruction).name);
});

TEST_P(AmxProductTest, MatchesTheModel) {
  CheckProducts(GetParam(), 600, rng_);
  EXPECT_EQ(Count(GetParam().instruction), IsNative() ? 0 : 600);
}

TEST_P(AmxProductTest, ExtremeShapes) {
  for (const int m : {1, 16}) {
    for (const int n : {1, 16}) {
      for (const int k : {1, 16}) {
        const Shape s = {m, n, k};
        const Operands in = RandomOperands(s, true, rng_);
        Operands out = in;
        GetParam().multiply[0](s, &out);
        EXPECT_EQ(out.c, Model(GetParam().instruction, s, in)) << m << " " << n << " " << k;
      }
    }
  }
}

TEST_P(AmxProductTest, EightThreads) {
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    threads.emplace_back([&form = GetParam(), seed] {
      Rng rng(seed);
      CheckProducts(form, 60, rng);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Computes c + (a[0] b[0] + ...) for one element of C.
uint32_t DotOfPairs(uint32_t c, const Words& a, const Words& b) {
  Operands o = {a, b, {c}};
  kForms[0].multiply[0]({1, 1, static_cast<int>(a.size())}, &o);
  return o.c[0];
}

TEST_F(AmxEmulatorTest, SpecialNumbers) {
  constexpr uint32_t kOne = 0x3F80, kMinusZero = 0x8000, kInf = 0x7F80, kDenormal = 0x0040;
  constexpr uint32_t kLeastNormal = 0x0080, kHalf = 0x3F00, kMinusOne = 0xBF80, kNan = 0x7FC0;
  // Chains begin with +0, so no sum of products is -0, and neither is C afterwards.
  EXPECT_EQ(DotOfPairs(0x80000000, {kMinusZero << 16 | kMinusZero}, {kOne << 16 | kOne}), 0u);
  EXPECT_EQ(DotOfPairs(0, {kInf}, {kOne}), 0x7F800000u);
  EXPECT_EQ(DotOfPairs(0, {kInf << 16 | kInf}, {kMinusOne << 16 | kOne}), 0xFFC00000u);
  EXPECT_EQ(DotOfPairs(0xFF800000, {kInf}, {kOne}), 0xFFC00000u);
  EXPECT_EQ(DotOfPairs(0, {kInf}, {0}), 0xFFC00000u);
  EXPECT_EQ(DotOfPairs(0x3F800000, {kNan}, {kOne}), 0x7FC00000u);
  EXPECT_EQ(DotOfPairs(0, {kInf}, {kDenormal}), 0xFFC00000u);  // the denormal is read as zero
  EXPECT_EQ(DotOfPairs(0, {kLeastNormal}, {kHalf}), 0u);       // the product is flushed to zero
  EXPECT_EQ(DotOfPairs(0x00400000, {0}, {0}), 0u);             // a denormal C
  EXPECT_EQ(DotOfPairs(0, {kLeastNormal}, {kOne}), 0x00800000u);
}

// Even and odd elements are summed in separate chains. Only then does 2^24 + 1 - 2^24 keep the 1.
TEST_F(AmxEmulatorTest, TwoChains) {
  constexpr uint32_t kOne = 0x3F80, kBig = 0x4B80, kMinusBig = 0xCB80;
  EXPECT_EQ(DotOfPairs(0, {kOne << 16 | kBig, kMinusBig}, {kOne << 16 | kOne, kOne}), 0x3F800000u);
  EXPECT_EQ(DotOfPairs(0, {kBig, kOne, kMinusBig}, {kOne, kOne, kOne}), 0u);
  // C is added last.
  EXPECT_EQ(DotOfPairs(0x4B800000, {kOne, kMinusBig}, {kOne, kOne}), 0x3F800000u);
}

TEST_F(AmxEmulatorTest, Int8SumsWrap) {
  const Shape s = {1, 1, 1};
  Operands o = {{0x7F7F7F7F}, {0x7F7F7F7F}, {0x7FFFFFFF}};
  kForm<Instruction::kTdpbssd>.multiply[0](s, &o);
  EXPECT_EQ(o.c[0], 0x7FFFFFFFu + 4 * 127 * 127);
  o = {{0x80808080}, {0xFFFFFFFF}, {0x80000000}};
  kForm<Instruction::kTdpbsud>.multiply[0](s, &o);
  EXPECT_EQ(o.c[0], 0x80000000u - 4 * 128 * 255);
  o = {{0x80808080}, {0xFFFFFFFF}, {0}};
  kForm<Instruction::kTdpbusd>.multiply[0](s, &o);
  EXPECT_EQ(o.c[0], 0u - 4 * 128);
}

TEST_F(AmxEmulatorTest, MxcsrIsNeitherReadNorUpdated) {
  const Shape s = {16, 16, 16};
  const Operands in = RandomOperands(s, true, rng_);
  Operands out = in;
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr(0x5F80);  // round up, denormals honoured
  kForms[0].multiply[0](s, &out);
  const uint32_t after = _mm_getcsr();
  _mm_setcsr(saved);
  EXPECT_EQ(after, 0x5F80);
  EXPECT_EQ(out.c, Model(Instruction::kTdpbf16ps, s, in));
}

}  // namespace
}  // namespace cpumoe::emulator

#endif
