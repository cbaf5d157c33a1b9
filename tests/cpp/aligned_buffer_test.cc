#include "base/aligned_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

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

}  // namespace
}  // namespace cpumoe
