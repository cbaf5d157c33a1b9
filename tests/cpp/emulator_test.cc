// Compares the instruction emulator with a scalar model, over every form of every instruction.
//
// Each form runs between a load and a store of the whole register file (ZMM0-31, k0-k7), and every
// bit of the stored file is compared. On a CPU with AVX512_BF16 these tests run the real
// instructions, which proves the model. There the tests also compare the emulator's arithmetic with
// the instructions.
#include "../emulator/emulator.h"

#include <gtest/gtest.h>

#if defined(__x86_64__) && defined(__linux__)

#include <ucontext.h>
#include <xmmintrin.h>

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../emulator/avx512_bf16.h"
#include "../emulator/bf16_test_forms.h"
#include "../emulator/bf16_test_model.h"
#include "../emulator/test_memory.h"

namespace cpumoe::emulator {
namespace {

void Run(const Form& form, const RegisterFile& in, RegisterFile* out, const uint8_t* operand) {
  uint64_t base = reinterpret_cast<uint64_t>(operand) - static_cast<uint64_t>(form.displacement);
  if (form.place == kFs) {
    uint64_t fs;
    asm("mov %%fs:0, %0" : "=r"(fs));
    base -= fs;
  }
  form.run(&in, out, reinterpret_cast<const void*>(base), operand);
}

void CheckForm(const Form& form, int iterations, Rng& rng) {
  Arena arena;
  uint8_t* operand = arena.end() - 64;
  for (int i = 0; i < iterations; ++i) {
    uint32_t memory[16];
    for (uint32_t& lane : memory) lane = RandomLane(rng);
    if (form.place == kRip) std::memcpy(memory, cpumoe_emulator_test_operand, 64);
    std::memcpy(operand, memory, 64);
    const RegisterFile in = RandomRegisters(rng);
    RegisterFile out;
    Run(form, in, &out, operand);
    const RegisterFile expected = Model(form, in, memory);
    for (int r = 0; r < 32; ++r) {
      for (int lane = 0; lane < 16; ++lane) {
        ASSERT_EQ(out.zmm[r][lane], expected.zmm[r][lane])
            << std::hex << form.name << " zmm" << r << " lane " << lane << " before "
            << in.zmm[r][lane];
      }
    }
    for (int k = 0; k < 8; ++k) ASSERT_EQ(out.k[k], expected.k[k]) << form.name << " k" << k;
  }
}

bool IsNative() { return __builtin_cpu_supports("avx512bf16") != 0; }

const Form& FindForm(const std::string& name) {
  for (const Form& form : kForms) {
    if (name == form.name) return form;
  }
  throw std::invalid_argument(name);
}

class EmulatorTest : public testing::Test {
 protected:
  void SetUp() override {
    __builtin_cpu_init();
    if (!Supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) {
      GTEST_SKIP() << "this CPU lacks AVX-512F or AVX-512BW";
    }
    Install();
    ResetCounts();
  }
  void TearDown() override { Uninstall(); }

  Rng rng_{20240607};
};

class EmulatorFormTest : public EmulatorTest, public testing::WithParamInterface<Form> {};

TEST_P(EmulatorFormTest, MatchesTheModel) {
  CheckForm(GetParam(), 300, rng_);
  const uint64_t emulated = Count(GetParam().instruction);
  EXPECT_EQ(emulated, IsNative() ? 0 : 300);
}

INSTANTIATE_TEST_SUITE_P(Forms, EmulatorFormTest, testing::ValuesIn(kForms),
                         [](const auto& test) { return std::string(test.param.name); });

TEST_F(EmulatorTest, ArithmeticMatchesTheModel) {
  for (int i = 0; i < 100000; ++i) {
    uint32_t a[16], b[16], sums[16], old[16];
    for (int lane = 0; lane < 16; ++lane) {
      a[lane] = RandomLane(rng_);
      b[lane] = RandomLane(rng_);
      old[lane] = sums[lane] = RandomLane(rng_);
    }
    DotProductBf16(a, b, sums);
    for (int lane = 0; lane < 16; ++lane) {
      ASSERT_EQ(sums[lane], ModelDot(a[lane], b[lane], old[lane]))
          << std::hex << a[lane] << " " << b[lane] << " " << old[lane];
      ASSERT_EQ(ConvertToBf16(a[lane]), ModelConvert(a[lane])) << std::hex << a[lane];
    }
  }
}

TEST_F(EmulatorTest, ArithmeticMatchesTheNativeInstructions) {
  if (!IsNative()) GTEST_SKIP() << "this CPU lacks AVX512_BF16";
  for (int i = 0; i < 100000; ++i) {
    const RegisterFile in = RandomRegisters(rng_);
    RegisterFile out, converted;
    FindForm("Dot512").run(&in, &out, in.zmm, in.zmm);
    FindForm("One512").run(&in, &converted, in.zmm, in.zmm);
    uint32_t sums[16];
    std::memcpy(sums, in.zmm[1], 64);
    DotProductBf16(in.zmm[2], in.zmm[3], sums);
    for (int lane = 0; lane < 16; ++lane) {
      ASSERT_EQ(sums[lane], out.zmm[1][lane]);
      const uint32_t pair = converted.zmm[1][lane / 2];
      ASSERT_EQ(ConvertToBf16(in.zmm[3][lane]), pair >> (lane % 2 * 16) & 0xFFFF);
    }
  }
}

TEST_F(EmulatorTest, EightThreads) {
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    threads.emplace_back([seed] {
      Rng rng(seed);
      for (const Form& form : kForms) CheckForm(form, 20, rng);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(EmulatorTest, CountsInstructionsAndOneTrapPerRun) {
  if (IsNative()) GTEST_SKIP() << "this CPU has AVX512_BF16, nothing traps";
  const RegisterFile in = RandomRegisters(rng_);
  RegisterFile out;
  EightInARow(&in, &out, in.zmm, in.zmm);
  EXPECT_EQ(Count(kDot), 8);
  EXPECT_EQ(Count(kOne), 1);
  EXPECT_EQ(Count(kTwo), 0);
  EXPECT_EQ(Traps(), 2);
  for (int lane = 0; lane < 16; ++lane) {
    uint32_t sum = in.zmm[1][lane];
    for (int i = 0; i < 8; ++i) sum = ModelDot(in.zmm[2][lane], in.zmm[3][lane], sum);
    EXPECT_EQ(out.zmm[1][lane], sum);
  }
  ResetCounts();
  EXPECT_EQ(Count(kDot) + Traps(), 0);
}

TEST_F(EmulatorTest, RegistersInTheirInitialStateAreZero) {
  alignas(64) uint8_t area[4096] = {};
  const uint32_t mxcsr = _mm_getcsr();
  std::memcpy(area + 24, &mxcsr, 4);
  const RegisterFile in = RandomRegisters(rng_);
  const std::vector<float> ones(16, 1.0F);
  RegisterFile out, expected = {};
  FromInitialState(&in, &out, area, ones.data());
  for (int i = 0; i < 8; ++i) expected.zmm[17][i] = 0x3F803F80;
  for (int i = 0; i < 4; ++i) expected.zmm[3][i] = std::bit_cast<uint32_t>(2.0F);
  EXPECT_EQ(std::memcmp(&out, &expected, sizeof(out)), 0);
}

TEST_F(EmulatorTest, MxcsrIsNeitherReadNorUpdated) {
  const Form& form = FindForm("Dot512");
  for (int i = 0; i < 100; ++i) {
    const RegisterFile in = RandomRegisters(rng_);
    RegisterFile out;
    const uint32_t saved = _mm_getcsr();
    _mm_setcsr(0x5F80);  // round up, denormals honoured
    form.run(&in, &out, in.zmm, in.zmm);
    const uint32_t after = _mm_getcsr();
    _mm_setcsr(saved);
    EXPECT_EQ(after, 0x5F80);
    const RegisterFile expected = Model(form, in, nullptr);
    EXPECT_EQ(std::memcmp(out.zmm, expected.zmm, sizeof(out.zmm)), 0);
  }
}

TEST_F(EmulatorTest, MaskedOffElementsDoNotFault) {
  Arena arena;
  const uint8_t* operand = arena.end() - 16;
  RegisterFile in = RandomRegisters(rng_);
  for (uint64_t& k : in.k) k = 0xF;
  for (const char* name : {"DotMemoryMerge", "DotMemoryZero"}) {
    const Form& form = FindForm(name);
    RegisterFile out;
    uint32_t memory[16] = {};
    std::memcpy(memory, operand, 16);
    form.run(&in, &out, operand - form.displacement, in.zmm);
    const RegisterFile expected = Model(form, in, memory);
    EXPECT_EQ(std::memcmp(out.zmm, expected.zmm, sizeof(out.zmm)), 0) << name;
  }
}

using EmulatorDeathTest = EmulatorTest;

TEST_F(EmulatorDeathTest, OperandsFault) {
  Arena arena;
  const RegisterFile in = RandomRegisters(rng_);
  RegisterFile out;
  const auto run = [&] {
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer's handler would turn the signal into an exit
    FindForm("DotMemory").run(&in, &out, arena.end() - 60, in.zmm);
  };
  EXPECT_EXIT(run(), testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(EmulatorDeathTest, OtherIllegalInstructionsKill) {
  EXPECT_EXIT(Execute({0x0F, 0x0B}), testing::KilledBySignal(SIGILL), "");  // ud2
  EXPECT_EXIT(raise(SIGILL), testing::KilledBySignal(SIGILL), "");
  // VDPBF16PS and VCVTNEPS2BF16 with reserved encodings. CPUs that have the instructions execute
  // some of these: Zen 4 executes the second.
  if (IsNative()) return;
  EXPECT_EXIT(Execute({0x62, 0xF2, 0x6E, 0x68, 0x52, 0xCB}), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(Execute({0x62, 0xF2, 0x6E, 0x58, 0x52, 0xCB}), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(Execute({0x62, 0xF2, 0x6E, 0xC8, 0x52, 0xCB}), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(Execute({0x62, 0xF2, 0xEE, 0x48, 0x52, 0xCB}), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(Execute({0x62, 0xF2, 0x6E, 0x48, 0x72, 0xCB}), testing::KilledBySignal(SIGILL), "");
}

TEST_F(EmulatorTest, ChainsToTheEarlierHandler) {
  Uninstall();
  static int calls;
  calls = 0;
  struct sigaction skip_ud2 = {}, original;
  skip_ud2.sa_flags = SA_SIGINFO;
  skip_ud2.sa_sigaction = [](int, siginfo_t*, void* context) {
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 2;
    ++calls;
  };
  sigaction(SIGILL, &skip_ud2, &original);
  Install();
  CheckForm(FindForm("Dot512"), 1, rng_);
  asm volatile("ud2");
  EXPECT_EQ(calls, 1);
  Uninstall();
  asm volatile("ud2");
  EXPECT_EQ(calls, 2);
  sigaction(SIGILL, &original, nullptr);
}

}  // namespace
}  // namespace cpumoe::emulator

#else

TEST(EmulatorTest, Skipped) { GTEST_SKIP() << "the emulator is for Linux on x86-64"; }

#endif
