// Transposes the 16 rows of words of a tile to lanes and back, in small blocks in vector registers
// of 16 bytes, which every CPU has.
//
// The vector types are the compiler's (GCC and Clang), so one source serves all ISAs. Interleaving
// compiles to punpck on x86 and to zip on aarch64.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/tile.h"

namespace cpumoe {

template <class Word>
struct BlockOf {
  static constexpr int kWords = 16 / sizeof(Word);  // rows, and also columns, of a block
  using Vector __attribute__((vector_size(16))) = Word;
};

// Returns words a0 b0 a1 b1 ... of the halves of both vectors that begin at word kFirst.
template <class Word, int kFirst, size_t... kIndex>
typename BlockOf<Word>::Vector Interleave(typename BlockOf<Word>::Vector a,
                                          typename BlockOf<Word>::Vector b,
                                          std::index_sequence<kIndex...>) {
  constexpr int kWords = BlockOf<Word>::kWords;
  return __builtin_shufflevector(
      a, b, (kFirst + static_cast<int>(kIndex) / 2 + static_cast<int>(kIndex) % 2 * kWords)...);
}

// Transposes a block of kWords x kWords words. load(i) returns row i as a Vector, and store(i,
// Vector) takes row i of the result.
template <class Word, class Load, class Store>
inline void TransposeBlock(Load&& load, Store&& store) {
  using Block = BlockOf<Word>;
  constexpr int kWords = Block::kWords, kHalf = kWords / 2;
  constexpr auto kIndices = std::make_index_sequence<kWords>{};
  typename Block::Vector rows[kWords], next[kWords];
  for (int i = 0; i < kWords; ++i) rows[i] = load(i);
  // If the rows are seen as one sequence of words, each round halves the distance between the words
  // of a column.
  for (int round = 1; round < kWords; round *= 2) {
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = Interleave<Word, 0>(rows[i], rows[i + kHalf], kIndices);
      next[2 * i + 1] = Interleave<Word, kHalf>(rows[i], rows[i + kHalf], kIndices);
    }
    for (int i = 0; i < kWords; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < kWords; ++i) store(i, rows[i]);
}

template <class Vector>
Vector LoadVector(const std::byte* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// Turns 16 rows of `count` words into out[count][16]. `map` is applied to every word, or to vectors
// of words where possible.
template <class Word, class Map>
void RowsToLanes(const std::byte* const (&rows)[kTileRows], int64_t count, std::byte* out,
                 Map map) {
  using Block = BlockOf<Word>;
  // The words of a cache line. All of them are used while the line is in cache.
  constexpr int kLine = 64 / sizeof(Word);
  constexpr int kLaneBytes = kTileRows * sizeof(Word);
  for (int64_t line = 0; line < count; line += kLine) {
    const int64_t end = std::min(line + kLine, count);
    for (int r = 0; r < kTileRows; r += Block::kWords) {
      for (int64_t w = line; w + Block::kWords <= end; w += Block::kWords) {
        std::byte* to = out + w * kLaneBytes + r * sizeof(Word);
        TransposeBlock<Word>(
            [&](int i) {
              const std::byte* from = rows[r + i] + w * sizeof(Word);
              return map(LoadVector<typename Block::Vector>(from));
            },
            [&](int i, auto vector) { std::memcpy(to + i * kLaneBytes, &vector, sizeof(vector)); });
      }
    }
  }
  for (int64_t w = count - count % Block::kWords; w < count; ++w) {
    for (int r = 0; r < kTileRows; ++r) {
      Word word;
      std::memcpy(&word, rows[r] + w * sizeof(Word), sizeof(Word));
      word = map(word);
      std::memcpy(out + w * kLaneBytes + r * sizeof(Word), &word, sizeof(Word));
    }
  }
}

// Turns in[count][16] into rows of `count` words, the reverse of RowsToLanes.
template <class Word>
void LanesToRows(const std::byte* in, int64_t count, Word* const (&rows)[kTileRows]) {
  using Block = BlockOf<Word>;
  constexpr int kLaneBytes = kTileRows * sizeof(Word);
  const int64_t whole = count - count % Block::kWords;
  for (int r = 0; r < kTileRows; r += Block::kWords) {
    for (int64_t w = 0; w < whole; w += Block::kWords) {
      const std::byte* from = in + w * kLaneBytes + r * sizeof(Word);
      TransposeBlock<Word>(
          [&](int i) { return LoadVector<typename Block::Vector>(from + i * kLaneBytes); },
          [&](int i, auto vector) { std::memcpy(rows[r + i] + w, &vector, sizeof(vector)); });
    }
  }
  for (int64_t w = whole; w < count; ++w) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(rows[r] + w, in + w * kLaneBytes + r * sizeof(Word), sizeof(Word));
    }
  }
}

}  // namespace cpumoe
