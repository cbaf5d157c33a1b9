// The registers of a thread that a signal has stopped. They are read and written in the signal
// frame, from which sigreturn loads them.
//
// General registers are in the ucontext. Vector and mask registers are in the XSAVE area that the
// ucontext points to, in standard (non-compacted) format (SDM volume 1, chapter 13):
//
//   bytes      0..511  legacy region: XMM0-15 at 160, Linux's _fpx_sw_bytes at 464
//            512..575  header: XSTATE_BV, then XCOMP_BV
//   CPUID 0xD, 2       upper halves of YMM0-15
//              5       k0-k7
//              6       upper halves of ZMM0-15
//              7       ZMM16-31
#pragma once

#if defined(__x86_64__) && defined(__linux__)

#include <ucontext.h>

#include <cstddef>
#include <cstdint>

namespace cpumoe::emulator {

class SignalFrame {
 public:
  // Asks CPUID where the components lie. Must be called before the first signal.
  static void Initialize();

  explicit SignalFrame(void* context);

  // Whether the operating system saved the state of AVX, and of AVX-512.
  bool HasAvx() const { return HasState(kAvxState); }
  bool HasAvx512() const { return HasState(kAvx512State); }

  const mcontext_t& registers() const { return context_->uc_mcontext; }
  uint64_t rip() const;
  void set_rip(uint64_t rip);

  void ReadVector(int number, uint32_t lanes[16]) const;   // ZMM0..31
  void WriteVector(int number, const uint32_t lanes[16]);  // all bits that the CPU has
  uint64_t ReadMask(int number) const;                     // k0..k7

 private:
  // XSAVE components by number.
  static constexpr int kSse = 1, kAvx = 2, kOpmask = 5, kZmmHi256 = 6, kHi16Zmm = 7;
  static constexpr uint64_t kAvxState = 1 << kSse | 1 << kAvx;
  static constexpr uint64_t kAvx512State =
      kAvxState | 1 << kOpmask | 1 << kZmmHi256 | 1 << kHi16Zmm;

  bool HasState(uint64_t components) const;
  void Read(int component, size_t offset, size_t size, void* to) const;
  void Write(int component, size_t offset, size_t size, const void* from);

  ucontext_t* context_;
  uint8_t* area_;
};

}  // namespace cpumoe::emulator

#endif
