// Compares the emulated VPDPBUSD with a scalar model, bit for bit.
//
// Each form runs between a load and a store of YMM0-15, and every stored bit is compared. On a CPU
// with AVX-VNNI these tests run the real instruction, which proves the model.
#include <gtest/gtest.h>

#include "emulator/emulator.h"

#if defined(__x86_64__) && defined(__linux__)

#include <csignal>
#include <cstring>
#include <random>
#include <string>

#include "emulator/test_memory.h"

namespace cpumoe::emulator {
namespace {

struct alignas(32) RegisterFile {
  uint32_t ymm[16][8];
};

constexpr int kMemory = -1;

struct Form {
  const char* name;
  int lanes;
  int sum, unsigned_bytes, signed_bytes;  // registers; signed_bytes may be kMemory
  int displacement;                       // from RAX and R13 to the operand, with RCX = 5
  void (*run)(const RegisterFile* in, RegisterFile* out, const void* base);
};

}  // namespace

#define CPUMOE_YMM ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
#define CPUMOE_ASM_FUNCTION(name, text)                                      \
  asm(".text\n.type " #name ",@function\n" #name                             \
      ":\n"                                                                  \
      "push %r13\nmov %rdx, %rax\nmov %rdx, %r13\nmov $5, %ecx\n" CPUMOE_YMM \
      "vmovdqu 32*\\i(%rdi), %ymm\\i\n.endr\n" text "\n" CPUMOE_YMM          \
      "vmovdqu %ymm\\i, 32*\\i(%rsi)\n.endr\n"                               \
      "vzeroupper\npop %r13\nret\n.size " #name ", .-" #name "\n");          \
  extern "C" void name(const RegisterFile* in, RegisterFile* out, const void* base)

// name, lanes, sum, unsigned, signed, displacement, text
#define CPUMOE_FORMS(X)                                                               \
  X(VnniYmm, 8, 1, 2, 3, 0, "{vex} vpdpbusd %ymm3, %ymm2, %ymm1")                     \
  X(VnniXmm, 4, 1, 2, 3, 0, "{vex} vpdpbusd %xmm3, %xmm2, %xmm1")                     \
  X(VnniHigh, 8, 15, 9, 12, 0, "{vex} vpdpbusd %ymm12, %ymm9, %ymm15")                \
  X(VnniMixed, 8, 0, 14, 7, 0, "{vex} vpdpbusd %ymm7, %ymm14, %ymm0")                 \
  X(VnniAliased, 8, 6, 6, 6, 0, "{vex} vpdpbusd %ymm6, %ymm6, %ymm6")                 \
  X(VnniMemory, 8, 1, 2, kMemory, 0, "{vex} vpdpbusd (%rax), %ymm2, %ymm1")           \
  X(VnniMemoryOfXmm, 4, 1, 2, kMemory, 0, "{vex} vpdpbusd (%r13), %xmm2, %xmm1")      \
  X(VnniDisplaced, 8, 8, 2, kMemory, -128, "{vex} vpdpbusd -128(%rax), %ymm2, %ymm8") \
  X(VnniFar, 8, 1, 2, kMemory, 4100, "{vex} vpdpbusd 4100(%r13), %ymm2, %ymm1")       \
  X(VnniIndexed, 8, 1, 2, kMemory, 20 + 3, "{vex} vpdpbusd 3(%rax,%rcx,4), %ymm2, %ymm1")

#define CPUMOE_DEFINE(name, lanes, c, a, b, displacement, text) CPUMOE_ASM_FUNCTION(name, text);
CPUMOE_FORMS(CPUMOE_DEFINE)
#undef CPUMOE_DEFINE

CPUMOE_ASM_FUNCTION(VnniBesideLoads,
                    "{vex} vpdpbusd %ymm3, %ymm2, %ymm1\n"
                    "vmovdqa (%rax), %ymm4\nvmovdqa 32(%r13), %xmm5\nvmovdqu 1(%rax), %ymm12\n"
                    "vpbroadcastd 8(%r13), %ymm6\nvpbroadcastd 4(%rax,%rcx,4), %xmm7\n"
                    "{vex} vpdpbusd %ymm4, %ymm6, %ymm8");
CPUMOE_ASM_FUNCTION(VnniBesideAMisalignedLoad,
                    "{vex} vpdpbusd %ymm3, %ymm2, %ymm1\nvmovdqa 4(%rax), %ymm4");

namespace {

#define CPUMOE_ROW(name, lanes, c, a, b, displacement, text) \
  {#name, lanes, c, a, b, displacement, name},
const Form kForms[] = {CPUMOE_FORMS(CPUMOE_ROW)};
#undef CPUMOE_ROW

bool IsNative() { return __builtin_cpu_supports("avxvnni") != 0; }

uint32_t ModelDot(uint32_t sum, uint32_t unsigned_bytes, uint32_t signed_bytes) {
  uint8_t a[4];
  int8_t b[4];
  std::memcpy(a, &unsigned_bytes, 4);
  std::memcpy(b, &signed_bytes, 4);
  int64_t whole = static_cast<int32_t>(sum);
  for (int i = 0; i < 4; ++i) whole += int64_t{a[i]} * b[i];
  return static_cast<uint32_t>(whole);
}

RegisterFile Model(const Form& form, const RegisterFile& in, const uint32_t* operand) {
  RegisterFile out = in;
  const uint32_t* b = form.signed_bytes == kMemory ? operand : in.ymm[form.signed_bytes];
  for (int lane = 0; lane < 8; ++lane) {
    const uint32_t sum =
        ModelDot(in.ymm[form.sum][lane], in.ymm[form.unsigned_bytes][lane], b[lane]);
    out.ymm[form.sum][lane] = lane < form.lanes ? sum : 0;
  }
  return out;
}

class AvxVnniEmulatorTest : public testing::Test {
 protected:
  void SetUp() override {
    __builtin_cpu_init();
    if (!Supports("avxvnni")) GTEST_SKIP() << "this CPU lacks AVX2";
    Install();
    ResetCounts();
  }
  void TearDown() override { Uninstall(); }

  // Half of the bytes are the greatest or the least, so that sums wrap.
  uint32_t RandomLane() {
    uint32_t lane = 0;
    for (int i = 0; i < 4; ++i) {
      constexpr uint8_t kExtremes[] = {0x00, 0x7f, 0x80, 0xff};
      const uint64_t bits = rng_();
      lane = lane << 8 | ((bits & 1) != 0 ? kExtremes[bits >> 8 & 3] : bits >> 8 & 0xff);
    }
    return lane;
  }

  RegisterFile RandomRegisters() {
    RegisterFile registers;
    for (auto& ymm : registers.ymm) {
      for (uint32_t& lane : ymm) lane = RandomLane();
    }
    return registers;
  }

  std::mt19937_64 rng_{3};
};

class AvxVnniFormTest : public AvxVnniEmulatorTest, public testing::WithParamInterface<Form> {};

TEST_P(AvxVnniFormTest, MatchesTheModel) {
  const Form& form = GetParam();
  Arena arena;
  uint8_t* operand = arena.end() - form.lanes * 4;  // the memory after the operand faults
  for (int i = 0; i < 1000; ++i) {
    const RegisterFile in = RandomRegisters();
    RegisterFile out;
    uint32_t memory[8] = {};
    for (int lane = 0; lane < form.lanes; ++lane) memory[lane] = RandomLane();
    std::memcpy(operand, memory, static_cast<size_t>(form.lanes) * 4);
    form.run(&in, &out, operand - form.displacement);
    const RegisterFile expected = Model(form, in, memory);
    for (int r = 0; r < 16; ++r) {
      for (int lane = 0; lane < 8; ++lane) {
        ASSERT_EQ(out.ymm[r][lane], expected.ymm[r][lane])
            << std::hex << "ymm" << r << " lane " << lane << " before " << in.ymm[r][lane];
      }
    }
  }
  EXPECT_EQ(Count(Instruction::kVpdpbusd), IsNative() ? 0 : 1000);
}

INSTANTIATE_TEST_SUITE_P(Forms, AvxVnniFormTest, testing::ValuesIn(kForms),
                         [](const auto& test) { return std::string(test.param.name); });

TEST_F(AvxVnniEmulatorTest, ASignalServesTheLoadsBetweenProducts) {
  alignas(32) uint32_t memory[16];
  for (uint32_t& lane : memory) lane = RandomLane();
  const RegisterFile in = RandomRegisters();
  RegisterFile out, expected = in;
  VnniBesideLoads(&in, &out, memory);
  std::memcpy(expected.ymm[4], memory, 32);
  std::memset(expected.ymm[5], 0, 32);
  std::memcpy(expected.ymm[5], memory + 8, 16);
  std::memcpy(expected.ymm[12], reinterpret_cast<const uint8_t*>(memory) + 1, 32);
  for (int lane = 0; lane < 8; ++lane) {
    expected.ymm[6][lane] = memory[2];
    expected.ymm[7][lane] = lane < 4 ? memory[6] : 0;
    expected.ymm[1][lane] = ModelDot(in.ymm[1][lane], in.ymm[2][lane], in.ymm[3][lane]);
    expected.ymm[8][lane] = ModelDot(in.ymm[8][lane], memory[2], memory[lane]);
  }
  EXPECT_EQ(std::memcmp(&out, &expected, sizeof(out)), 0);
  EXPECT_EQ(Count(Instruction::kVpdpbusd), IsNative() ? 0 : 2);
  EXPECT_EQ(Traps(), IsNative() ? 0 : 1);
}

// The upper half of a 512-bit register becomes zero, as after every VEX instruction.
TEST_F(AvxVnniEmulatorTest, ClearsTheUpperHalf) {
  if (!__builtin_cpu_supports("avx512f")) GTEST_SKIP() << "this CPU lacks AVX-512F";
  alignas(64) uint32_t zmm[16];
  for (uint32_t& lane : zmm) lane = RandomLane();
  asm volatile(
      "vmovdqu64 %0, %%zmm1\n\tvpxor %%xmm2, %%xmm2, %%xmm2\n\t"
      "%{vex%} vpdpbusd %%ymm2, %%ymm2, %%ymm1\n\t"
      "vmovdqu64 %%zmm1, %0\n\tvzeroupper"
      : "+m"(zmm)
      :
      : "xmm1", "xmm2");
  for (int lane = 8; lane < 16; ++lane) EXPECT_EQ(zmm[lane], 0u);
}

using AvxVnniEmulatorDeathTest = AvxVnniEmulatorTest;

TEST_F(AvxVnniEmulatorDeathTest, OperandsFault) {
  Arena arena;
  const RegisterFile in = {};
  RegisterFile out;
  const auto run = [&] {
    std::signal(SIGSEGV, SIG_DFL);  // a sanitizer's handler would turn the signal into an exit
    VnniMemory(&in, &out, arena.end() - 28);
  };
  EXPECT_EXIT(run(), testing::KilledBySignal(SIGSEGV), "");
  const auto misaligned = [&] {
    std::signal(SIGSEGV, SIG_DFL);
    VnniBesideAMisalignedLoad(&in, &out, &in);
  };
  EXPECT_EXIT(misaligned(), testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(AvxVnniEmulatorDeathTest, AReservedEncodingKills) {
  EXPECT_EXIT(Execute({0xC4, 0xE2, 0xED, 0x50, 0xCB}), testing::KilledBySignal(SIGILL), "");  // W1
}

}  // namespace
}  // namespace cpumoe::emulator

#endif
