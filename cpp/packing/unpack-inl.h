// Unpacks tiles (kernels/tile.h) to checkpoint rows, bit for bit, past the caches.
//
// Whoever takes an exported expert, such as a GPU, reads it from memory. An ordinary store reads
// the line that it changes, and drives out of the caches what calls need. A streaming store does
// neither, but writes whole lines only. Therefore 256 bytes of each of a tile's rows are gathered
// in L1:
//
//      64 vectors of the tile  --transposed-->  16 rows of 256 bytes  --streamed-->  memory
//
// Rows whose memory is not aligned to lines, or that are shorter than a line, are written with
// ordinary stores at their ends. If registers are as wide as lines, aligned lines are streamed from
// registers. Reading and writing then alternate more finely, which is faster.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/bits.h"
#include "base/check.h"
#include "base/float_types.h"
#include "formats/weight_format.h"
#include "kernels/isa.h"
#include "kernels/tile.h"
#include "packing/pack.h"
#include "packing/raw_matrix.h"
#include "packing/transpose.h"

namespace cpumoe {

// The next bytes of a tile's rows, on their way to memory.
template <StreamIsa Isa>
class RowStage {
 public:
  static constexpr int64_t kRowBytes = 4 * kVectorBytes;

  std::byte* Row(int row) { return bytes_[row]; }

  // Writes the first `count` bytes of every row to rows[row] + offset. Leaves out null rows.
  void Write(std::byte* const (&rows)[kTileRows], int64_t offset, int64_t count) const {
    for (int r = 0; r < kTileRows; ++r) {
      if (rows[r] != nullptr) Copy(rows[r] + offset, bytes_[r], count);
    }
  }

 private:
  static void Copy(std::byte* to, const std::byte* from, int64_t count) {
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kVectorBytes);
    int64_t i = std::min(misaligned == 0 ? 0 : kVectorBytes - misaligned, count);
    std::memcpy(to, from, i);
    for (; i + kVectorBytes <= count; i += kVectorBytes) Isa::Stream(to + i, from + i);
    std::memcpy(to + i, from + i, count - i);
  }

  alignas(kVectorBytes) std::byte bytes_[kTileRows][kRowBytes];
};

// Transposes sixteen vectors of a tile to one line of each row, in the widest registers of an ISA.
//
// A register holds kLanes lanes of four words. Words change places within their lanes first, and
// whole lanes afterwards.
template <int kRegisterBytes>
class LineTranspose {
 public:
  static constexpr int kVectors = 16;
  using Words __attribute__((vector_size(kRegisterBytes))) = uint32_t;

  // Calls store(row, byte of the line, Words) for all parts of all lines. `map` is applied to
  // vectors of words.
  template <class Map, class Store>
  static void Run(const std::byte* in, Map map, Store store) {
    for (int part = 0; part < kVectorBytes; part += kRegisterBytes) {    // of the vectors
      for (int line = 0; line < kVectorBytes; line += kRegisterBytes) {  // the part of the lines
        Words blocks[kLanes][4];
        for (int b = 0; b < kLanes; ++b) {
          const std::byte* from = in + (line / 4 + 4 * b) * kVectorBytes + part;
          TransposeWords([&](int i) { return map(Load(from + i * kVectorBytes)); }, blocks[b]);
        }
        for (int i = 0; i < 4; ++i) {
          TransposeLanes(
              [&](int b) { return blocks[b][i]; },
              [&](int lane, const Words& words) { store(part / 4 + i + 4 * lane, line, words); });
        }
      }
    }
  }

 private:
  static constexpr int kLanes = kRegisterBytes / 16;
  static constexpr int kWords = kRegisterBytes / 4;
  static_assert(kLanes == 1 || kLanes == 2 || kLanes == 4);

  static Words Load(const std::byte* from) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    return words;
  }

  // Word w of the result is word kIndex(w) of a and b one after the other.
  template <auto kIndex, int... kWord>
  static Words Permute(const Words& a, const Words& b, std::integer_sequence<int, kWord...>) {
    return __builtin_shufflevector(a, b, kIndex(kWord)...);
  }
  template <auto kIndex>
  static Words Permute(const Words& a, const Words& b) {
    return Permute<kIndex>(a, b, std::make_integer_sequence<int, kWords>{});
  }
  // In each lane: words kFirst and kFirst + 1 of both operands, in turns.
  template <int kFirst>
  static constexpr auto kInterleave =
      [](int w) { return w / 4 * 4 + kFirst + w % 4 / 2 + w % 2 * kWords; };
  // In each lane: words kFirst and kFirst + 1 of a, then those of b.
  template <int kFirst>
  static constexpr auto kConcatenate =
      [](int w) { return w / 4 * 4 + kFirst + w % 2 + w % 4 / 2 * kWords; };
  // Every other lane of a from lane kFirst on, then those of b.
  template <int kFirst>
  static constexpr auto kEveryOtherLane = [](int w) {
    const int lane = w / 4, half = kLanes / 2;
    return lane % half * 8 + 4 * kFirst + w % 4 + lane / half * kWords;
  };

  // Transposes the 4 x 4 words of each lane of load(0..3).
  template <class Load>
  static void TransposeWords(Load&& load, Words (&out)[4]) {
    const Words a = load(0), b = load(1), c = load(2), d = load(3);
    const Words ab[] = {Permute<kInterleave<0>>(a, b), Permute<kInterleave<2>>(a, b)};
    const Words cd[] = {Permute<kInterleave<0>>(c, d), Permute<kInterleave<2>>(c, d)};
    for (int half = 0; half < 2; ++half) {
      out[2 * half] = Permute<kConcatenate<0>>(ab[half], cd[half]);
      out[2 * half + 1] = Permute<kConcatenate<2>>(ab[half], cd[half]);
    }
  }

  // Transposes the kLanes x kLanes lanes of load(0..kLanes - 1). store(lane, Words) takes them.
  template <class Load, class Store>
  static void TransposeLanes(Load&& load, Store&& store) {
    if constexpr (kLanes == 1) {
      store(0, load(0));
    } else if constexpr (kLanes == 2) {
      store(0, Permute<kEveryOtherLane<0>>(load(0), load(1)));
      store(1, Permute<kEveryOtherLane<1>>(load(0), load(1)));
    } else {
      const Words even[] = {Permute<kEveryOtherLane<0>>(load(0), load(1)),
                            Permute<kEveryOtherLane<0>>(load(2), load(3))};
      const Words odd[] = {Permute<kEveryOtherLane<1>>(load(0), load(1)),
                           Permute<kEveryOtherLane<1>>(load(2), load(3))};
      store(0, Permute<kEveryOtherLane<0>>(even[0], even[1]));
      store(1, Permute<kEveryOtherLane<0>>(odd[0], odd[1]));
      store(2, Permute<kEveryOtherLane<1>>(even[0], even[1]));
      store(3, Permute<kEveryOtherLane<1>>(odd[0], odd[1]));
    }
  }
};

// Writes the part of a tile that belongs to rows [row_begin, row_begin + out.rows) and columns
// [column_begin, column_begin + out.columns) of the matrix to `out`. The first column must begin a
// group. Scales are those of the first weight of each block of `out`. Other threads and devices
// are sure to see `out` after Isa::FinishStreams.
template <StreamIsa Isa, WeightFormat F>
class TileUnpacker {
 public:
  using Layout = PackedLayout<F>;

  static void Unpack(const TileView& view, int64_t tile, int64_t matrix_rows, int64_t row_begin,
                     int64_t column_begin, const MutableRawMatrix& out) {
    const int64_t first = std::max(tile * kTileRows, row_begin);
    const int64_t last = std::min({(tile + 1) * kTileRows, row_begin + out.rows, matrix_rows});
    if (first >= last) return;
    const int64_t group = column_begin / kGroupSize;
    std::byte* codes[kTileRows] = {};  // null for a row that is not wanted
    std::byte* scales[kTileRows] = {};
    for (int64_t row = first; row < last; ++row) {
      codes[row % kTileRows] = out.codes + (row - row_begin) * out.codes_stride;
      if (HasScales<F> && (row - row_begin) % out.grid.rows == 0) {
        scales[row % kTileRows] = out.ScalesOf(row - row_begin);
      }
    }
    UnpackCodes(view.codes + group * Geometry::kGroupBytes, out.columns * F::kCodeBits / 8, codes);
    if constexpr (HasScales<F>) {
      UnpackScales(view.scales, column_begin, out, scales);
    }
  }

 private:
  using Geometry = typename Layout::Geometry;
  using Stage = RowStage<Isa>;
  using Line = LineTranspose<Isa::kRegisterBytes>;
  static constexpr int64_t kWordBytes = 4;
  static constexpr auto kUnswap = [](auto words) { return SwapEvenOdd<F::kCodeBits>(words); };

  // Writes the first `bytes` of each row.
  static void UnpackCodes(const std::byte* in, int64_t bytes, std::byte* const (&rows)[kTileRows]) {
    const int64_t vectors = CeilDiv(bytes, kWordBytes);
    if (Isa::kRegisterBytes == kVectorBytes && bytes % kVectorBytes == 0 && AreLines(rows)) {
      for (int64_t v = 0; v < vectors; v += Line::kVectors) {
        Line::Run(in + v * kVectorBytes, kUnswap, [&](int row, int, const auto& words) {
          Isa::Stream(rows[row] + v * kWordBytes, reinterpret_cast<const std::byte*>(&words));
        });
      }
      return;
    }
    Stage stage;
    for (int64_t v = 0; v < vectors; v += Stage::kRowBytes / kWordBytes) {
      const int64_t end = std::min(v + Stage::kRowBytes / kWordBytes, vectors);
      int64_t i = v;
      const auto run = [&](const std::byte* from) {
        Line::Run(from, kUnswap, [&](int row, int byte, const auto& words) {
          std::memcpy(stage.Row(row) + (i - v) * kWordBytes + byte, &words, sizeof(words));
        });
      };
      for (; i + Line::kVectors <= end; i += Line::kVectors) run(in + i * kVectorBytes);
      if (i < end) {
        std::byte rest[Line::kVectors * kVectorBytes] = {};
        std::memcpy(rest, in + i * kVectorBytes, (end - i) * kVectorBytes);
        run(rest);
      }
      stage.Write(rows, v * kWordBytes, std::min(end * kWordBytes, bytes) - v * kWordBytes);
    }
  }

  static bool AreLines(std::byte* const (&rows)[kTileRows]) {
    return std::ranges::all_of(rows, [](const std::byte* row) {
      return row != nullptr && reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0;
    });
  }

  static constexpr int64_t kScaleLanes = kTileRows * Layout::kScaleBytes;

  // Writes scales, one per out.grid.depth columns from column_begin on. `in` are those of the tile.
  static void UnpackScales(const std::byte* in, int64_t column_begin, const MutableRawMatrix& out,
                           std::byte* const (&rows)[kTileRows]) {
    constexpr int64_t kDepth = kPackedDepthOf<F>;
    if (std::ranges::all_of(rows, [](const std::byte* row) { return row == nullptr; })) return;
    const int64_t count = out.scale_columns();
    std::vector<std::byte> chosen;  // lanes of the scales to write
    if (out.grid.depth == kDepth && column_begin % kDepth == 0) {
      in += column_begin / kDepth * kScaleLanes;
    } else {
      chosen.resize(count * kScaleLanes);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t run = (column_begin + i * out.grid.depth) / kDepth;
        std::memcpy(&chosen[i * kScaleLanes], in + run * kScaleLanes, kScaleLanes);
      }
      in = chosen.data();
    }
    VisitScaleType<typename F::Scale>(out.grid.type, [&]<class To>(To) {
      if constexpr (kConverts<To>) UnpackScales<To>(in, count, rows);
    });
  }

  // Whether scales may be written as type To.
  template <class To>
  static constexpr bool kConverts =
      std::is_same_v<To, typename F::Scale> ||
      HoldsScales(TypeOfScale<typename F::Scale>(), TypeOfScale<To>()) ||
      AllowsScaleType<F>(TypeOfScale<To>());

  // Writes scales as type To.
  template <class To>
  static void UnpackScales(const std::byte* in, int64_t groups,
                           std::byte* const (&rows)[kTileRows]) {
    using Word = typename Layout::ScaleWord;
    constexpr int64_t kTo = sizeof(To);
    constexpr int64_t kGroups = Stage::kRowBytes / std::max(kTo, Layout::kScaleBytes);
    Stage stage;
    Word words[kTileRows][kGroups];
    Word* word_rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) word_rows[r] = words[r];
    for (int64_t g = 0; g < groups; g += kGroups) {
      const int64_t count = std::min(kGroups, groups - g);
      LanesToRows<Word>(in + g * kTileRows * Layout::kScaleBytes, count, word_rows);
      for (int r = 0; r < kTileRows; ++r) Convert<To>(words[r], count, stage.Row(r));
      stage.Write(rows, g * kTo, count * kTo);
    }
  }

  template <class To, class Word>
  static void Convert(const Word* words, int64_t count, std::byte* out) {
    using Packed = typename Layout::PackedScale;
    if constexpr (std::is_same_v<To, Packed>) {
      std::memcpy(out, words, count * sizeof(Word));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const auto packed = std::bit_cast<Packed>(words[i]);
        const To scale = [&] {
          if constexpr (std::is_same_v<Packed, E8M0> && std::is_same_v<To, Bf16>) {
            return packed.ToBf16();  // vectorises
          } else {
            return ExactScale<To>(packed.ToFloat());
          }
        }();
        std::memcpy(out + i * sizeof(scale), &scale, sizeof(scale));
      }
    }
  }
};

// Throws std::invalid_argument unless each block of `wanted` of the `count` columns or rows from
// `begin` on lies within one of the blocks of `stored` that share a scale.
inline void RequireBlocks(const char* name, const char* what, int64_t begin, int64_t count,
                          int64_t wanted, int64_t stored) {
  for (int64_t i = 0; i < count; i += wanted) {
    const int64_t last = std::min(i + wanted, count) - 1;
    Require((begin + i) / stored == (begin + last) / stored, name, ": ", stored, " ", what,
            " share a scale, so ", count, " ", what, " from ", begin,
            " on cannot have a scale for each ", wanted);
  }
}

// Throws std::invalid_argument unless `out`, which gets the part of a matrix that begins with `row`
// and `column`, has a scale wherever the stored matrix begins another one, of a type that holds it.
template <ScaledFormat F>
void RequireHoldsScales(MutableRawMatrix out, int64_t row, int64_t column,
                        const ScaleGrid& stored) {
  const ScaleType given = std::exchange(out.grid.type, ScaleType::kOwn);
  out.template RequireScales<F>();
  const ScaleType type = given == ScaleType::kOwn ? TypeOfScale<typename F::Scale>() : given;
  Require(HoldsScales(stored.type, type), out.name, ": ", ScaleTypeName(type),
          " scales cannot hold the stored ", ScaleTypeName(stored.type),
          " ones; pass scales of that type");
  RequireBlocks(out.name, "columns", column, out.columns, out.grid.depth, stored.depth);
  RequireBlocks(out.name, "rows", row, out.rows, out.grid.rows, stored.rows);
}

}  // namespace cpumoe
