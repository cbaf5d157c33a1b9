// The fixture of every test of a kernel or operator. It runs a test once per ISA (x format) of the
// tables.
//
// If this CPU lacks the ISA, the test runs under the instruction emulator, provided that the
// emulator supplies all missing features. Otherwise the test is skipped and names the missing
// features.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpp/kernel_probe.h"
#include "dispatch/cpu_features.h"
#include "moe/config.h"
#include "variant/variant_api.h"

namespace cpumoe {

struct IsaFormat {
  std::string isa;
  std::string format;
  Precision precision = Precision::kBf16;
  // Whether activations of fp32 calls may be rounded to bf16. Matters only on ISAs with bf16.
  bool fp32_as_bf16 = true;
};
void PrintTo(const IsaFormat& param, std::ostream* out);

// The ISAs to test: those of the environment variable CPUMOE_TEST_ISAS, or all.
std::vector<std::string> IsaNames();
// Why the tests of an ISA cannot run here. Empty if they can, natively or under the emulator.
std::string ObstacleTo(const std::string& isa);
std::vector<IsaFormat> IsaFormats();
// Every ISA and format with every precision. ISAs with bf16 come also without rounding fp32 to it.
std::vector<IsaFormat> IsaFormatsAndPaths();

// The name of a parameter for INSTANTIATE_TEST_SUITE_P: avx2, avx2_mxfp4, avx2_mxfp4_int8,
// avx512_bf16_mxfp4_fp32.
std::string NameOfIsa(const testing::TestParamInfo<std::string>& info);
std::string NameOfIsaFormat(const testing::TestParamInfo<IsaFormat>& info);

// Opens the ISA's library. Checks at the end that this ISA, and no other, computed.
class IsaRun {
 public:
  // Returns why the ISA cannot run here. Returns an empty string if it can, and has then loaded it.
  std::string Begin(const std::string& isa);
  void End() const;

  // Call this in tests with so many tokens that the ISA multiplies floating point numbers, by its
  // best instruction. With fewer tokens an ISA may multiply bytes, by instructions that it shares
  // with other ISAs.
  void ExpectBestDots() { expects_best_dots_ = true; }

  // Whether AVX-VNNI is emulated. In that case even the few-token kernels cost a signal per product
  // (a microsecond, several under sanitizers), and the largest tests take fewer tokens.
  bool MultipliesBySignals() const { return emulated_.contains("avxvnni"); }

  const VariantApi& variant() const { return *variant_; }
  const kernel_probe::Api& probe() const { return *probe_; }

 private:
  FeatureSet features_;  // features that the ISA needs
  FeatureSet emulated_;  // those of features_ that this CPU lacks
  bool expects_best_dots_ = false;
  const VariantApi* variant_ = nullptr;
  const kernel_probe::Api* probe_ = nullptr;
};

template <class Param>
class IsaTestBase : public testing::TestWithParam<Param> {
 protected:
  void Begin(const std::string& isa) {
    const std::string reason = run_.Begin(isa);
    if (!reason.empty()) GTEST_SKIP() << reason;
    ASSERT_EQ(run_.variant().isa, isa);
    ASSERT_EQ(run_.probe().isa, isa);
  }
  void TearDown() override {
    if (!this->IsSkipped() && !this->HasFatalFailure()) run_.End();
  }

  IsaRun run_;
};

class IsaTest : public IsaTestBase<std::string> {
 protected:
  void SetUp() override { Begin(GetParam()); }
};

class IsaFormatTest : public IsaTestBase<IsaFormat> {
 protected:
  void SetUp() override;

  Precision precision() const { return GetParam().precision; }
  // Whether many tokens are multiplied in the ISA's floating point type.
  bool multiplies_floats() const {
    return precision() == Precision::kBf16 && GetParam().fp32_as_bf16;
  }
  // See IsaRun. AVX-VNNI multiplies bytes, so that it does nothing for codes that are no integers.
  // Wide kernels are those of another ISA.
  void ExpectBestDots() {
    if (kernels().wide) return;
    if (kernels().digits || !run_.MultipliesBySignals()) run_.ExpectBestDots();
  }
  const std::string& format() const { return GetParam().format; }  // the row of the table
  const FormatEntry& entry() const;
  const kernel_probe::FormatEntry& kernels() const;

  // Ends SetUp. Skips the test if the ISA lacks such kernels for the format, unless the test is
  // skipped already.
  void RequireKernels(bool kernel_probe::FormatEntry::* kind, const char* name) const;
};

// Instantiates a suite derived from IsaTest or IsaFormatTest over the tables.
#define CPUMOE_FOR_EACH_ISA(Suite) \
  INSTANTIATE_TEST_SUITE_P(, Suite, testing::ValuesIn(IsaNames()), NameOfIsa)
#define CPUMOE_FOR_EACH_ISA_AND_FORMAT(Suite) \
  INSTANTIATE_TEST_SUITE_P(, Suite, testing::ValuesIn(IsaFormats()), NameOfIsaFormat)
#define CPUMOE_FOR_EACH_ISA_FORMAT_AND_PATH(Suite) \
  INSTANTIATE_TEST_SUITE_P(, Suite, testing::ValuesIn(IsaFormatsAndPaths()), NameOfIsaFormat)

}  // namespace cpumoe
