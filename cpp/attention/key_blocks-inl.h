// Rows of q, k and v as the kernels of attention read them: in fp32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/float_types.h"
#include "kernels/tile.h"
#include "packing/transpose.h"

namespace cpumoe {

template <class Isa>
struct KeyBlocks {
  // out[0, RoundUp(count, 16)) = in[0, count), with zeros behind.
  template <class Element>
  static void Widen(const Element* in, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows) Isa::Store(out + i, Isa::Load(in + i));
    if (i == count) return;
    Element rest[kTileRows] = {};
    std::copy_n(in + i, count - i, rest);
    Isa::Store(out + i, Isa::Load(rest));
  }

  // Turns `keys` rows of `columns` elements, `stride` elements apart, into out
  // [tiles][columns][16], where a lane is a key. Lanes without a key repeat the last key.
  template <class Element>
  static void Transpose(const Element* in, int64_t stride, int64_t keys, int64_t columns,
                        float* out) {
    for (int64_t first = 0; first < keys; first += kTileRows, out += columns * kTileRows) {
      const std::byte* rows[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        rows[r] = reinterpret_cast<const std::byte*>(in + std::min(first + r, keys - 1) * stride);
      }
      TransposeTile<Element>(rows, columns, out);
    }
  }

 private:
  static constexpr auto kAsItIs = [](auto word) { return word; };

  template <class Element>
  static void TransposeTile(const std::byte* const (&rows)[kTileRows], int64_t columns,
                            float* out) {
    if constexpr (std::is_same_v<Element, float>) {
      RowsToLanes<uint32_t>(rows, columns, reinterpret_cast<std::byte*>(out), kAsItIs);
    } else {
      // Pairs of elements move as one word. They lie in the last part of `out` until they are
      // widened, and no pair is overwritten before that.
      const int64_t pairs = columns / 2;
      auto* words = reinterpret_cast<std::byte*>(out + (columns - pairs) * kTileRows);
      RowsToLanes<uint32_t>(rows, pairs, words, kAsItIs);
      for (int64_t i = 0; i < pairs; ++i) {
        const auto pair = ToPair<Element>(Isa::LoadCodes(words + i * kVectorBytes));
        Isa::Store(out + 2 * i * kTileRows, pair.even);
        Isa::Store(out + (2 * i + 1) * kTileRows, pair.odd);
      }
      if (columns % 2 == 0) return;
      for (int r = 0; r < kTileRows; ++r) {
        Element last;
        std::memcpy(&last, rows[r] + (columns - 1) * sizeof(Element), sizeof(Element));
        out[(columns - 1) * kTileRows + r] = last.ToFloat();
      }
    }
  }

  template <class Element>
  static typename Isa::Pair ToPair(typename Isa::Codes codes) {
    if constexpr (std::is_same_v<Element, Bf16>) {
      return Isa::FromBf16(codes);
    } else {
      return Isa::FromFp16(codes);
    }
  }
};

}  // namespace cpumoe
