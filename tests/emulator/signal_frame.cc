// See signal_frame.h.
#include "signal_frame.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>

#include <csignal>
#include <cstring>

namespace cpumoe::emulator {
namespace {

constexpr int kNumComponents = 8;  // up to the last component that SignalFrame uses

constexpr size_t kXmmOffset = 160;
constexpr size_t kSoftwareBytesOffset = 464;
constexpr size_t kXstateBvOffset = 512;
constexpr size_t kXcompBvOffset = 520;

struct Component {
  size_t offset, size;
};
Component components[kNumComponents];

uint64_t LoadQword(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

}  // namespace

void SignalFrame::Initialize() {
  components[kSse] = {kXmmOffset, 16 * 16};
  for (int number = kAvx; number < kNumComponents; ++number) {
    unsigned size = 0, offset = 0, flags = 0, reserved = 0;
    __get_cpuid_count(0xD, static_cast<unsigned>(number), &size, &offset, &flags, &reserved);
    components[number] = {offset, size};
  }
}

SignalFrame::SignalFrame(void* context)
    : context_(static_cast<ucontext_t*>(context)),
      area_(reinterpret_cast<uint8_t*>(context_->uc_mcontext.fpregs)) {}

bool SignalFrame::HasState(uint64_t components) const {
  if (area_ == nullptr) return false;
  _fpx_sw_bytes software;
  std::memcpy(&software, area_ + kSoftwareBytesOffset, sizeof(software));
  const bool compacted = LoadQword(area_ + kXcompBvOffset) >> 63 != 0;
  return software.magic1 == FP_XSTATE_MAGIC1 && (software.xstate_bv & components) == components &&
         !compacted;
}

uint64_t SignalFrame::rip() const {
  return static_cast<uint64_t>(context_->uc_mcontext.gregs[REG_RIP]);
}

void SignalFrame::set_rip(uint64_t rip) {
  context_->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(rip);
}

// A clear bit of XSTATE_BV says that a component is in its initial state. For these components that
// is zero, whatever the area holds.
void SignalFrame::Read(int component, size_t offset, size_t size, void* to) const {
  if ((LoadQword(area_ + kXstateBvOffset) >> component & 1) != 0) {
    std::memcpy(to, area_ + components[component].offset + offset, size);
  } else {
    std::memset(to, 0, size);
  }
}

void SignalFrame::Write(int component, size_t offset, size_t size, const void* from) {
  uint8_t* begin = area_ + components[component].offset;
  uint64_t xstate_bv = LoadQword(area_ + kXstateBvOffset);
  if ((xstate_bv >> component & 1) == 0) {
    std::memset(begin, 0, components[component].size);
    xstate_bv |= uint64_t{1} << component;
    std::memcpy(area_ + kXstateBvOffset, &xstate_bv, sizeof(xstate_bv));
  }
  std::memcpy(begin + offset, from, size);
}

void SignalFrame::ReadVector(int number, uint32_t lanes[16]) const {
  const size_t i = static_cast<size_t>(number & 15);
  if (number >= 16) {
    Read(kHi16Zmm, i * 64, 64, lanes);
  } else {
    Read(kSse, i * 16, 16, lanes);
    Read(kAvx, i * 16, 16, lanes + 4);
    Read(kZmmHi256, i * 32, 32, lanes + 8);
  }
}

void SignalFrame::WriteVector(int number, const uint32_t lanes[16]) {
  const size_t i = static_cast<size_t>(number & 15);
  if (number >= 16) {
    Write(kHi16Zmm, i * 64, 64, lanes);
  } else {
    Write(kSse, i * 16, 16, lanes);
    Write(kAvx, i * 16, 16, lanes + 4);
    if (HasAvx512()) Write(kZmmHi256, i * 32, 32, lanes + 8);
  }
}

uint64_t SignalFrame::ReadMask(int number) const {
  uint64_t mask;
  Read(kOpmask, static_cast<size_t>(number) * 8, 8, &mask);
  return mask;
}

}  // namespace cpumoe::emulator

#endif
