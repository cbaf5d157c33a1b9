// Every form of the AVX512_BF16 instructions, as a function that runs it on a whole register file.
// Only emulator_test.cc may include this file, because it defines assembly functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator.h"

namespace cpumoe::emulator {
namespace {

constexpr Instruction kDot = Instruction::kVdpbf16ps;
constexpr Instruction kOne = Instruction::kVcvtneps2bf16;
constexpr Instruction kTwo = Instruction::kVcvtne2ps2bf16;

struct alignas(64) RegisterFile {
  uint32_t zmm[32][16];
  uint64_t k[8];
};

constexpr int kMem = -1;
constexpr int64_t kRcx = 5, kR9 = -7;  // the index registers of the memory forms

// The place of a form's last operand.
enum Place { kReg, kBase, kStack, kRip, kFs };

struct Form {
  const char* name;
  Instruction instruction;
  int bytes;              // vector length
  int destination, a, b;  // registers; b may be kMem
  int mask;
  bool zeroing, broadcast;
  Place place;
  int64_t displacement;  // from the base register to the operand
  void (*run)(const void* in, void* out, const void* base, const void* operand);
};

}  // namespace

// Defines an assembly function of type Form::run. The base registers are RAX, R12 (which needs a
// SIB byte), and R13 and RBP (which need a displacement). The index registers are RCX and R9.
// 64(%rsp) is a copy of the operand.
#define CPUMOE_ASM_FUNCTION(name, text)                                               \
  asm(".text\n.type " #name ",@function\n" #name                                      \
      ":\n"                                                                           \
      "push %rbp\npush %r12\npush %r13\nsub $256, %rsp\n"                             \
      "vmovdqu64 (%rcx), %zmm0\nvmovdqu64 %zmm0, 64(%rsp)\n"                          \
      "mov %rdx, %rax\nmov %rdx, %r12\nmov %rdx, %r13\nmov %rdx, %rbp\n"              \
      "mov $5, %ecx\nmov $-7, %r9\n"                                                  \
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,"   \
      "26,27,28,29,30,31\nvmovdqu64 64*\\i(%rdi), %zmm\\i\n.endr\n"                   \
      ".irp i,0,1,2,3,4,5,6,7\nkmovq 2048+8*\\i(%rdi), %k\\i\n.endr\n" text           \
      "\n.irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25," \
      "26,27,28,29,30,31\nvmovdqu64 %zmm\\i, 64*\\i(%rsi)\n.endr\n"                   \
      ".irp i,0,1,2,3,4,5,6,7\nkmovq %k\\i, 2048+8*\\i(%rsi)\n.endr\n"                \
      "vzeroupper\nadd $256, %rsp\npop %r13\npop %r12\npop %rbp\nret\n"               \
      ".size " #name ", .-" #name "\n");                                              \
  extern "C" void name(const void* in, void* out, const void* base, const void* operand)

// name, instruction, bytes, destination, a, b, mask, zeroing, broadcast, place, displacement, text
#define CPUMOE_FORMS(X)                                                                            \
  X(Dot512, kDot, 64, 1, 2, 3, 0, 0, 0, kReg, 0, "vdpbf16ps %zmm3, %zmm2, %zmm1")                  \
  X(Dot256, kDot, 32, 1, 2, 3, 0, 0, 0, kReg, 0, "vdpbf16ps %ymm3, %ymm2, %ymm1")                  \
  X(Dot128, kDot, 16, 1, 2, 3, 0, 0, 0, kReg, 0, "vdpbf16ps %xmm3, %xmm2, %xmm1")                  \
  X(DotHigh512, kDot, 64, 31, 24, 17, 0, 0, 0, kReg, 0, "vdpbf16ps %zmm17, %zmm24, %zmm31")        \
  X(DotHigh128, kDot, 16, 16, 9, 31, 0, 0, 0, kReg, 0, "vdpbf16ps %xmm31, %xmm9, %xmm16")          \
  X(DotMixed, kDot, 64, 8, 16, 12, 0, 0, 0, kReg, 0, "vdpbf16ps %zmm12, %zmm16, %zmm8")            \
  X(DotAliased, kDot, 64, 7, 7, 7, 0, 0, 0, kReg, 0, "vdpbf16ps %zmm7, %zmm7, %zmm7")              \
  X(DotMerge, kDot, 64, 1, 2, 3, 1, 0, 0, kReg, 0, "vdpbf16ps %zmm3, %zmm2, %zmm1{%k1}")           \
  X(DotMerge128, kDot, 16, 1, 2, 3, 7, 0, 0, kReg, 0, "vdpbf16ps %xmm3, %xmm2, %xmm1{%k7}")        \
  X(DotZero, kDot, 64, 1, 2, 3, 4, 1, 0, kReg, 0, "vdpbf16ps %zmm3, %zmm2, %zmm1{%k4}{z}")         \
  X(DotZero256, kDot, 32, 20, 2, 3, 2, 1, 0, kReg, 0, "vdpbf16ps %ymm3, %ymm2, %ymm20{%k2}{z}")    \
  X(DotMemory, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 0, "vdpbf16ps (%rax), %zmm2, %zmm1")          \
  X(DotDisp8, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, -128, "vdpbf16ps -128(%rax), %zmm2, %zmm1")    \
  X(DotDisp8Of256, kDot, 32, 1, 2, kMem, 0, 0, 0, kBase, 96, "vdpbf16ps 96(%r13), %ymm2, %ymm1")   \
  X(DotDisp8Of128, kDot, 16, 1, 2, kMem, 0, 0, 0, kBase, 2032,                                     \
    "vdpbf16ps 2032(%r12), %xmm2, %xmm1")                                                          \
  X(DotDisp32, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 65, "vdpbf16ps 65(%rax), %zmm2, %zmm1")       \
  X(DotRbp, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 0, "vdpbf16ps (%rbp), %zmm2, %zmm1")             \
  X(DotSib, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, -8192 + 4 * kRcx,                                \
    "vdpbf16ps -8192(%rax,%rcx,4), %zmm2, %zmm1")                                                  \
  X(DotSibHigh, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 8 * kR9,                                     \
    "vdpbf16ps (%r13,%r9,8), %zmm2, %zmm1")                                                        \
  X(DotSibNoBase, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 3, "vdpbf16ps 3(,%rax,1), %zmm2, %zmm1")   \
  X(DotStack, kDot, 64, 1, 2, kMem, 0, 0, 0, kStack, 0, "vdpbf16ps 64(%rsp), %zmm2, %zmm1")        \
  X(DotRip, kDot, 64, 1, 2, kMem, 0, 0, 0, kRip, 0,                                                \
    "vdpbf16ps cpumoe_emulator_test_operand(%rip), %zmm2, %zmm1")                                  \
  X(DotAddress32, kDot, 64, 1, 2, kMem, 0, 0, 0, kBase, 64, "vdpbf16ps 64(%eax), %zmm2, %zmm1")    \
  X(DotFs, kDot, 64, 1, 2, kMem, 0, 0, 0, kFs, 64, "vdpbf16ps %fs:64(%rax), %zmm2, %zmm1")         \
  X(DotBroadcast, kDot, 64, 1, 2, kMem, 0, 0, 1, kBase, 8,                                         \
    "vdpbf16ps 8(%rax){1to16}, %zmm2, %zmm1")                                                      \
  X(DotBroadcast256, kDot, 32, 1, 2, kMem, 0, 0, 1, kBase, -512,                                   \
    "vdpbf16ps -512(%rax){1to8}, %ymm2, %ymm1")                                                    \
  X(DotBroadcast128, kDot, 16, 30, 29, kMem, 3, 0, 1, kStack, 0,                                   \
    "vdpbf16ps 64(%rsp){1to4}, %xmm29, %xmm30{%k3}")                                               \
  X(DotMemoryMerge, kDot, 64, 1, 2, kMem, 5, 0, 0, kBase, 64,                                      \
    "vdpbf16ps 64(%rax), %zmm2, %zmm1{%k5}")                                                       \
  X(DotMemoryZero, kDot, 64, 1, 2, kMem, 6, 1, 0, kBase, 64,                                       \
    "vdpbf16ps 64(%rax), %zmm2, %zmm1{%k6}{z}")                                                    \
  X(One512, kOne, 64, 1, 0, 3, 0, 0, 0, kReg, 0, "vcvtneps2bf16 %zmm3, %ymm1")                     \
  X(One256, kOne, 32, 18, 0, 25, 0, 0, 0, kReg, 0, "vcvtneps2bf16 %ymm25, %xmm18")                 \
  X(One128, kOne, 16, 1, 0, 3, 0, 0, 0, kReg, 0, "vcvtneps2bf16 %xmm3, %xmm1")                     \
  X(OneMerge, kOne, 64, 1, 0, 3, 1, 0, 0, kReg, 0, "vcvtneps2bf16 %zmm3, %ymm1{%k1}")              \
  X(OneZero, kOne, 32, 1, 0, 3, 2, 1, 0, kReg, 0, "vcvtneps2bf16 %ymm3, %xmm1{%k2}{z}")            \
  X(OneMemory, kOne, 64, 1, 0, kMem, 0, 0, 0, kBase, 64, "vcvtneps2bf16 64(%rax), %ymm1")          \
  X(OneMemory256, kOne, 32, 1, 0, kMem, 3, 0, 0, kBase, 64, "vcvtneps2bf16y 64(%r12), %xmm1{%k3}") \
  X(OneMemory128, kOne, 16, 1, 0, kMem, 0, 0, 0, kBase, 64, "vcvtneps2bf16x 64(%rax), %xmm1")      \
  X(OneBroadcast, kOne, 64, 1, 0, kMem, 0, 0, 1, kBase, 4, "vcvtneps2bf16 4(%rax){1to16}, %ymm1")  \
  X(Two512, kTwo, 64, 1, 2, 3, 0, 0, 0, kReg, 0, "vcvtne2ps2bf16 %zmm3, %zmm2, %zmm1")             \
  X(Two256, kTwo, 32, 1, 22, 3, 0, 0, 0, kReg, 0, "vcvtne2ps2bf16 %ymm3, %ymm22, %ymm1")           \
  X(Two128, kTwo, 16, 1, 2, 3, 0, 0, 0, kReg, 0, "vcvtne2ps2bf16 %xmm3, %xmm2, %xmm1")             \
  X(TwoMerge, kTwo, 64, 1, 2, 3, 1, 0, 0, kReg, 0, "vcvtne2ps2bf16 %zmm3, %zmm2, %zmm1{%k1}")      \
  X(TwoZero, kTwo, 32, 1, 2, 3, 2, 1, 0, kReg, 0, "vcvtne2ps2bf16 %ymm3, %ymm2, %ymm1{%k2}{z}")    \
  X(TwoMemory, kTwo, 64, 1, 2, kMem, 0, 0, 0, kBase, 128,                                          \
    "vcvtne2ps2bf16 128(%rax), %zmm2, %zmm1")                                                      \
  X(TwoBroadcast, kTwo, 16, 1, 2, kMem, 4, 0, 1, kBase, 12,                                        \
    "vcvtne2ps2bf16 12(%rax){1to4}, %xmm2, %xmm1{%k4}")

#define CPUMOE_DEFINE(name, i, n, d, a, b, k, z, m, p, disp, text) CPUMOE_ASM_FUNCTION(name, text);
CPUMOE_FORMS(CPUMOE_DEFINE)
#undef CPUMOE_DEFINE

// Two runs of adjacent instructions, with another instruction between them.
CPUMOE_ASM_FUNCTION(EightInARow,
                    ".rept 8\nvdpbf16ps %zmm3, %zmm2, %zmm1\n.endr\n"
                    "vpaddd %zmm1, %zmm0, %zmm0\nvcvtneps2bf16 %zmm1, %ymm4");

// XRSTOR puts the vector and mask registers into their initial state, which signal frames flag
// instead of storing.
CPUMOE_ASM_FUNCTION(FromInitialState,
                    "mov $0xE6, %eax\nxor %edx, %edx\nxrstor (%r12)\n"
                    "vcvtneps2bf16 64(%rsp), %ymm17\nvdpbf16ps %xmm17, %xmm17, %xmm3");

extern "C" {
alignas(64) extern const uint32_t cpumoe_emulator_test_operand[16];
alignas(64) const uint32_t cpumoe_emulator_test_operand[16] = {
    0x3F803F80, 0x40004000, 0xBF81C049, 0x00010001, 0x7F807F80, 0x7FC17F81, 0x42284228, 0x80008000,
    0x3F8B3E9A, 0x3DCCBDCC, 0xFF80FF80, 0x41C8C1C8, 0x00800080, 0x7F7FFF7F, 0x3F000000, 0x00003F00};
}

namespace {

#define CPUMOE_ROW(name, i, n, d, a, b, k, z, m, p, disp, text) \
  {#name, i, n, d, a, b, k, z != 0, m != 0, p, disp, name},
const Form kForms[] = {CPUMOE_FORMS(CPUMOE_ROW)};
#undef CPUMOE_ROW

}  // namespace
}  // namespace cpumoe::emulator
