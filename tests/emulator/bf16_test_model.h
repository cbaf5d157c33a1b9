// The AVX512_BF16 instructions on a whole register file, in portable C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16_test_arithmetic.h"
#include "bf16_test_forms.h"

namespace cpumoe::emulator {
namespace {

// Returns the register file after `form`, given the form's memory operand.
RegisterFile Model(const Form& form, const RegisterFile& in, const uint32_t* operand) {
  RegisterFile out = in;
  const int lanes = form.bytes / 4;
  uint32_t b[16];
  for (int i = 0; i < 16; ++i) {
    b[i] = form.b == kMem ? operand[form.broadcast ? 0 : i] : in.zmm[form.b][i];
  }
  const uint64_t mask = form.mask == 0 ? ~uint64_t{0} : in.k[form.mask];
  uint16_t old_words[32], words[32] = {};
  std::memcpy(old_words, in.zmm[form.destination], 64);
  uint32_t* destination = out.zmm[form.destination];
  if (form.instruction == kDot) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t old = in.zmm[form.destination][i];
      const bool active = (mask >> i & 1) != 0;
      destination[i] = active ? ModelDot(in.zmm[form.a][i], b[i], old) : form.zeroing ? 0 : old;
      if (i >= lanes) destination[i] = 0;
    }
    return out;
  }
  for (int i = 0; i < (form.instruction == kTwo ? 2 * lanes : lanes); ++i) {
    const uint32_t source = i < lanes ? b[i] : in.zmm[form.a][i - lanes];
    const bool active = (mask >> i & 1) != 0;
    words[i] = active ? ModelConvert(source) : form.zeroing ? uint16_t{0} : old_words[i];
  }
  std::memcpy(destination, words, 64);
  return out;
}

RegisterFile RandomRegisters(Rng& rng) {
  RegisterFile registers;
  for (auto& zmm : registers.zmm) {
    for (uint32_t& lane : zmm) lane = RandomLane(rng);
  }
  for (uint64_t& k : registers.k) k = rng();
  return registers;
}

}  // namespace
}  // namespace cpumoe::emulator
