#include "base/aligned_buffer.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace cpumoe {
namespace {

uintptr_t Address(const AlignedBuffer& buffer) {
  return reinterpret_cast<uintptr_t>(buffer.data());
}

TEST(AlignedBufferTest, IsAlignedZeroAndWritable) {
  for (const size_t size : {size_t{1}, size_t{64}, size_t{4097}, AlignedBuffer::kHugePage,
                            AlignedBuffer::kHugePage * 3 + 1}) {
    const AlignedBuffer buffer(size);
    EXPECT_EQ(buffer.size(), size);
    const bool huge = size >= AlignedBuffer::kHugePage;
    EXPECT_EQ(Address(buffer) % (huge ? AlignedBuffer::kHugePage : AlignedBuffer::kCacheLine), 0u);
    std::byte* end = buffer.data() + size;
    EXPECT_TRUE(std::all_of(buffer.data(), end, [](std::byte b) { return b == std::byte{0}; }));
    std::fill(buffer.data(), end, std::byte{0xff});
  }
}

TEST(AlignedBufferTest, EmptyHasNoMemory) {
  EXPECT_EQ(AlignedBuffer().data(), nullptr);
  EXPECT_EQ(AlignedBuffer(0).data(), nullptr);
}

TEST(AlignedBufferTest, Moves) {
  AlignedBuffer first(100);
  std::byte* data = first.data();
  AlignedBuffer second(std::move(first));
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(second.size(), 100u);
  AlignedBuffer third(5000);
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  EXPECT_EQ(third.size(), 100u);
}

TEST(AlignedBuffer, GivesWholePagesBackAndTakesMemoryAgain) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const size_t size : {8 * page, size_t{4} << 20}) {
    const AlignedBuffer buffer(size);
    std::memset(buffer.data(), 7, size);
    const auto resident = [&] {
      std::vector<unsigned char> pages(size / page);
      EXPECT_EQ(mincore(buffer.data(), size, pages.data()), 0);
      return std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; });
    };
    const auto all = static_cast<ptrdiff_t>(size / page);
    EXPECT_EQ(resident(), all);
    buffer.GiveBack(page + 1, page - 1);  // no whole page
    buffer.GiveBack(page, 0);
    EXPECT_EQ(resident(), all);
    buffer.GiveBack(page + 1, 3 * page);  // two whole pages
    EXPECT_EQ(resident(), all - 2);
    EXPECT_EQ(buffer.data()[2 * page - 1], std::byte{7});
    EXPECT_EQ(buffer.data()[4 * page], std::byte{7});
    std::memset(buffer.data(), 8, size);
    EXPECT_EQ(resident(), all);
  }
}

}  // namespace
}  // namespace cpumoe
