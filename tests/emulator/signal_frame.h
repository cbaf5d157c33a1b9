// The registers of a thread stopped by a signal, read and written in its signal frame; sigreturn
// then loads them.
//
// General registers are in the ucontext. Vector and mask registers are in the XSAVE area that it
// points to, in standard (non-compacted) format (SDM volume 1, chapter 13):
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
  // Asks CPUID where the components lie. To be called before the first signal.
  static void Initialize();

  explicit SignalFrame(void* context);

  // False if the kernel saved no AVX-512 state.
  bool HasVectors() const;

  const mcontext_t& registers() const { return context_->uc_mcontext; }
  uint64_t rip() const;
  void set_rip(uint64_t rip);

  void ReadVector(int number, uint32_t lanes[16]) const;   // ZMM0..31
  void WriteVector(int number, const uint32_t lanes[16]);  // all 512 bits
  uint64_t ReadMask(int number) const;                     // k0..k7

 private:
  void Read(int component, size_t offset, size_t size, void* to) const;
  void Write(int component, size_t offset, size_t size, const void* from);

  ucontext_t* context_;
  uint8_t* area_;
};

}  // namespace cpumoe::emulator

#endif
