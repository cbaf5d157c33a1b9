// The loops that measure an ISA's limits do the work that they claim to do.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpp/isa_test.h"

namespace cpumoe {
namespace {

class LimitsTest : public IsaTest {};

TEST_P(LimitsTest, PeaksCountEveryRound) {
  for (size_t i = 0; i < run_.variant().num_formats; ++i) {
    const FormatEntry& format = run_.variant().formats[i];
    for (const PeakLoop loop : format.peaks) {
      const int64_t round = loop(1);
      EXPECT_GT(round, 0) << format.info.name;
      EXPECT_EQ(loop(0), 0) << format.info.name;
      EXPECT_EQ(loop(7), 7 * round) << format.info.name;
    }
  }
}

TEST_P(LimitsTest, ReadStaysWithinItsData) {
  for (const int64_t count : {int64_t{0}, kReadGranule, 3 * kReadGranule}) {
    const std::vector<float> data(count,
                                  1.0f);  // AddressSanitizer would notice a read beyond the end
    run_.variant().read(data.data(), count);
  }
}

TEST_P(LimitsTest, CopyCopiesEveryByteAndNoMore) {
  for (const int64_t bytes : {int64_t{0}, kCopyGranule, 3 * kCopyGranule}) {
    std::vector<std::byte> from(bytes);
    for (int64_t i = 0; i < bytes; ++i) from[i] = static_cast<std::byte>(i * 37 + i / 64);
    const AlignedBuffer to(bytes + 1);
    to.data()[bytes] = std::byte{0xee};
    run_.variant().copy(to.data(), from.data(), bytes);
    EXPECT_TRUE(std::equal(from.begin(), from.end(), to.data()));
    EXPECT_EQ(to.data()[bytes], std::byte{0xee});
  }
}

TEST_P(LimitsTest, FewTokensAreInOrder) {
  for (size_t i = 0; i < run_.variant().num_formats; ++i) {
    const FormatEntry& format = run_.variant().formats[i];
    EXPECT_GE(format.few_tokens.crossover, 0) << format.info.name;
    EXPECT_LE(format.few_tokens.crossover, format.few_tokens.most) << format.info.name;
  }
}

CPUMOE_FOR_EACH_ISA(LimitsTest);

}  // namespace
}  // namespace cpumoe
