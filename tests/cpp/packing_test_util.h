// The fixture of the tests of packing.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpp/all_formats.h"
#include "cpp/message_of.h"
#include "cpp/test_matrix.h"
#include "packing/pack.h"
#include "packing/unpack-inl.h"

namespace cpumoe {

// Ordinary stores, from registers as wide as those of some ISA. `streamed` counts lines.
template <int kBytes>
struct PlainStores {
  static constexpr int kRegisterBytes = kBytes;
  static inline int streamed = 0;
  static void Stream(std::byte* to, const std::byte* from) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(to) % kVectorBytes, 0u);
    std::memcpy(to, from, kVectorBytes);
    ++streamed;
  }
  static void FinishStreams() {}
};

template <class F>
class PackingTest : public testing::Test {
 protected:
  using Layout = PackedLayout<F>;
  static std::string Name() { return RowOf<F>(); }

  static std::vector<std::byte> Pack(const Layout& layout, const RawMatrix& source,
                                     ScaleRange* range = nullptr) {
    std::vector<std::byte> packed(layout.bytes());
    for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
      const ScaleRange scales = layout.PackTile(source, tile, packed.data());
      if (range != nullptr) range->Merge(scales);
    }
    return packed;
  }
  template <class Isa = PlainStores<16>>
  static void Unpack(const Layout& layout, const std::vector<std::byte>& packed, int64_t row_begin,
                     int64_t column_begin, const MutableRawMatrix& out) {
    for (int64_t tile = 0; tile < layout.tiles(); ++tile) {
      TileUnpacker<Isa, F>::Unpack(layout.Tile(packed.data(), tile), tile, layout.rows(), row_begin,
                                   column_begin, out);
    }
  }
};

}  // namespace cpumoe
