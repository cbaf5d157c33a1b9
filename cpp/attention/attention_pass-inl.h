// AttentionPass: attention on one ISA, in fp32, without a matrix of scores.
//
// A task is a unit of rows and a chunk of keys (attention_plan.h). It reads each key and value once
// for all rows:
//
//   for each block of keys
//     K tile [head_size][keys], V block [keys][value_size]   in fp32; a lane of the tile is a key
//     S = Q K                                               [rows][keys]
//     P = exp(scale * S + mask - m)                         m: the greatest score of the row so far
//     l = l * exp(m_before - m) + sum(P)
//     O = O * exp(m_before - m) + P V                       [rows][value_size]
//   output = O / l
//
// This is the "online softmax" of Milakov and Gimelshein (2018), in blocks as in FlashAttention-2
// (Dao, 2023). Chunks of one unit are merged by the same formula. A row that sees no key is zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "attention/attention.h"
#include "attention/attention_plan.h"
#include "attention/key_blocks-inl.h"
#include "attention/row_gemm-inl.h"
#include "base/bits.h"
#include "kernels/exp-inl.h"
#include "kernels/tanh-inl.h"
#include "kernels/tile.h"
#include "paths/scratch_memory.h"
#include "staging/stage-inl.h"
#include "threading/thread_pool.h"

namespace cpumoe {

template <class Isa>
class AttentionPass {
  using Vec = typename Isa::Vec;

 public:
  AttentionPass(const AttentionArgs& args, ThreadPool& pool, ScratchMemory& scratch)
      : args_(args), plan_(args, Isa::kPanelTokens), pool_(pool), scratch_(scratch) {}

  void Run() {
    const int64_t units = plan_.units(), chunks = plan_.chunks();
    // A single chunk is finished where it was computed.
    const int64_t kept = chunks == 1 ? 0 : units * chunks * SumFloats();
    merged_ = reinterpret_cast<float*>(scratch_.Activations(kept * sizeof(float)));
    scratch_.ReserveScratch(pool_.num_threads(), TaskFloats() * sizeof(float));
    // Later units of causal attention take longer, so they come first.
    pool_.For(units * chunks, [&](int64_t task, int thread) {
      const int64_t unit = units - 1 - task / chunks, chunk = task % chunks;
      auto* memory = reinterpret_cast<float*>(scratch_.Scratch(thread));
      if (chunks == 1) {
        Compute(unit, 0, memory + SumFloats(), memory);
        Finish(unit, memory);
      } else {
        Compute(unit, chunk, memory + SumFloats(), Kept(unit, chunk));
      }
    });
    if (chunks == 1) return;
    pool_.For(units, [&](int64_t unit, int) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk) Merge(unit, chunk);
      Finish(unit, Kept(unit, 0));
    });
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // A unit: rows [begin, end) of a group of heads.
  struct Unit {
    int64_t batch, kv_head, begin, end;
    int64_t rows() const { return end - begin; }
  };
  Unit UnitOf(int64_t unit) const {
    const int64_t begin = unit % plan_.blocks() * plan_.rows();
    const int64_t group = unit / plan_.blocks();
    return {group / args_.kv_heads, group % args_.kv_heads, begin,
            std::min(begin + plan_.rows(), args_.queries * plan_.group())};
  }
  int64_t QueryOf(int64_t row) const { return row / plan_.group(); }
  int64_t HeadOf(const Unit& unit, int64_t row) const {
    return unit.kv_head * plan_.group() + row % plan_.group();
  }

  // The sums of a unit and a chunk: m [rows], l [rows], O [rows][values].
  struct Sums {
    float *m, *l, *o;
  };
  Sums SumsAt(float* memory) const {
    return {memory, memory + PaddedRows(), memory + 2 * PaddedRows()};
  }
  int64_t PaddedRows() const { return RoundUp(plan_.rows(), int64_t{kTileRows}); }
  int64_t SumFloats() const { return 2 * PaddedRows() + plan_.rows() * plan_.values(); }
  float* Kept(int64_t unit, int64_t chunk) const {
    return merged_ + (unit * plan_.chunks() + chunk) * SumFloats();
  }
  int64_t PaddedHead() const { return RoundUp(args_.head_size, int64_t{kTileRows}); }
  int64_t TaskFloats() const {
    return SumFloats() + plan_.rows() * (PaddedHead() + plan_.block_keys()) +
           plan_.block_keys() * (args_.head_size + plan_.values());
  }

  // Computes the sums of a unit and a chunk of its keys, with `memory` for everything else.
  void Compute(int64_t index, int64_t chunk, float* memory, float* sums_memory) const {
    const Unit unit = UnitOf(index);
    const Sums sums = SumsAt(sums_memory);
    std::fill_n(sums.m, unit.rows(), -kInfinity);
    std::fill_n(sums.l, unit.rows(), 0.0f);
    std::fill_n(sums.o, unit.rows() * plan_.values(), 0.0f);
    float* q = memory;
    float* scores = q + plan_.rows() * PaddedHead();
    float* k = scores + plan_.rows() * plan_.block_keys();
    float* v = k + plan_.block_keys() * args_.head_size;
    const KeyRange keys = plan_.Chunk(QueryOf(unit.begin), QueryOf(unit.end - 1), chunk);
    if (keys.begin == keys.end) return;
    StageQueries(unit, q);
    for (int64_t first = keys.begin; first < keys.end; first += plan_.block_keys()) {
      const int64_t count = std::min(plan_.block_keys(), keys.end - first);
      StageKeys(unit, first, count, k, v);
      const int64_t tiles = CeilDiv(count, int64_t{kTileRows});
      RowGemm<Isa>::Run({.a = q,
                         .a_stride = PaddedHead(),
                         .b = k,
                         .b_stride = kTileRows,
                         .vector_stride = args_.head_size * kTileRows,
                         .c = scores,
                         .c_stride = plan_.block_keys(),
                         .depth = args_.head_size,
                         .accumulate = false},
                        unit.rows(), tiles);
      for (int64_t r = 0; r < unit.rows(); ++r) {
        Softmax(unit, r, {first, first + count}, scores + r * plan_.block_keys(), sums);
      }
      RowGemm<Isa>::Run({.a = scores,
                         .a_stride = plan_.block_keys(),
                         .b = v,
                         .b_stride = plan_.values(),
                         .vector_stride = kTileRows,
                         .c = sums.o,
                         .c_stride = plan_.values(),
                         .depth = count,
                         .accumulate = true},
                        unit.rows(), plan_.values() / kTileRows);
    }
  }

  void StageQueries(const Unit& unit, float* q) const {
    VisitElements(args_.dtype, args_.q.data, [&](const auto* elements) {
      for (int64_t row = unit.begin; row < unit.end; ++row, q += PaddedHead()) {
        KeyBlocks<Isa>::Widen(elements + args_.q.Row(unit.batch, HeadOf(unit, row), QueryOf(row)),
                              args_.head_size, q);
      }
    });
  }

  void StageKeys(const Unit& unit, int64_t first, int64_t count, float* k, float* v) const {
    VisitElements(args_.dtype, args_.k.data, [&](const auto* elements) {
      KeyBlocks<Isa>::Transpose(elements + args_.k.Row(unit.batch, unit.kv_head, first),
                                args_.k.row_stride, count, args_.head_size, k);
    });
    VisitElements(args_.dtype, args_.v.data, [&](const auto* elements) {
      elements += args_.v.Row(unit.batch, unit.kv_head, first);
      for (int64_t i = 0; i < count; ++i, elements += args_.v.row_stride, v += plan_.values()) {
        KeyBlocks<Isa>::Widen(elements, args_.value_size, v);
      }
    });
  }

  // Turns the products of row `r` with some keys into weights, and updates m, l and O.
  void Softmax(const Unit& unit, int64_t r, KeyRange keys, float* scores, const Sums& sums) const {
    const int64_t row = unit.begin + r, query = QueryOf(row);
    const int64_t count = keys.end - keys.begin, padded = RoundUp(count, int64_t{kTileRows});
    const KeyRange seen = plan_.Visible(query);
    const int64_t begin = std::clamp<int64_t>(seen.begin - keys.begin, 0, count);
    const int64_t end = std::clamp<int64_t>(seen.end - keys.begin, begin, count);
    Scale(scores, padded);
    if (args_.mask_type != MaskType::kNone) {
      const int64_t at = args_.mask.Row(unit.batch, HeadOf(unit, row), query) + keys.begin;
      ApplyMask(at, begin, end, scores);
    }
    std::fill(scores, scores + begin, -kInfinity);
    std::fill(scores + end, scores + padded, -kInfinity);

    Vec most = Isa::Broadcast(-kInfinity);
    for (int64_t i = 0; i < padded; i += kTileRows) most = Isa::Max(most, Isa::Load(scores + i));
    const float before = sums.m[r], m = std::max(before, Greatest(most));
    const Vec base = Isa::Broadcast(-Finite(m));
    Vec sum = Isa::Zero();
    for (int64_t i = 0; i < padded; i += kTileRows) {
      const Vec weight = Exp<Isa>(Isa::Add(Isa::Load(scores + i), base));
      Isa::Store(scores + i, weight);
      sum = Isa::Add(sum, weight);
    }
    if (m != before && before != -kInfinity) Rescale(r, ExpOf(before - Finite(m)), sums);
    sums.m[r] = m;
    sums.l[r] += SumOf(sum);
  }

  void Scale(float* scores, int64_t count) const {
    const Vec scale = Isa::Broadcast(args_.scale);
    for (int64_t i = 0; i < count; i += kTileRows) {
      Isa::Store(scores + i, Isa::Mul(Isa::Load(scores + i), scale));
    }
    if (args_.softcap == 0.0f) return;
    const Vec cap = Isa::Broadcast(args_.softcap);
    for (int64_t i = 0; i < count; i += kTileRows) {
      const Vec capped = Tanh<Isa>(Isa::Div(Isa::Load(scores + i), cap));
      Isa::Store(scores + i, Isa::Mul(cap, capped));
    }
  }

  // Applies the mask from element `at` on to scores [begin, end).
  void ApplyMask(int64_t at, int64_t begin, int64_t end, float* scores) const {
    if (args_.mask_type == MaskType::kBool) {
      const auto* mask = static_cast<const uint8_t*>(args_.mask.data) + at;
      for (int64_t i = begin; i < end; ++i) scores[i] = mask[i] != 0 ? scores[i] : -kInfinity;
    } else if (args_.mask_type == MaskType::kFp32) {
      const auto* mask = static_cast<const float*>(args_.mask.data) + at;
      for (int64_t i = begin; i < end; ++i) scores[i] += mask[i];
    } else if (args_.mask_type == MaskType::kBf16) {
      const auto* mask = static_cast<const Bf16*>(args_.mask.data) + at;
      for (int64_t i = begin; i < end; ++i) scores[i] += mask[i].ToFloat();
    } else {
      const auto* mask = static_cast<const Fp16*>(args_.mask.data) + at;
      for (int64_t i = begin; i < end; ++i) scores[i] += mask[i].ToFloat();
    }
  }

  // Multiplies the sums of a row.
  void Rescale(int64_t r, float factor, const Sums& sums) const {
    sums.l[r] *= factor;
    const Vec f = Isa::Broadcast(factor);
    float* o = sums.o + r * plan_.values();
    for (int64_t i = 0; i < plan_.values(); i += kTileRows) {
      Isa::Store(o + i, Isa::Mul(Isa::Load(o + i), f));
    }
  }

  // Adds the sums of a chunk to those of the unit's chunk 0.
  void Merge(int64_t index, int64_t chunk) const {
    const Unit unit = UnitOf(index);
    const Sums to = SumsAt(Kept(index, 0)), from = SumsAt(Kept(index, chunk));
    for (int64_t r = 0; r < unit.rows(); ++r) {
      const float m = std::max(to.m[r], from.m[r]);
      if (from.m[r] == -kInfinity && from.l[r] == 0.0f) continue;
      Rescale(r, ExpOf(to.m[r] - Finite(m)), to);
      Rescale(r, ExpOf(from.m[r] - Finite(m)), from);
      to.m[r] = m;
      to.l[r] += from.l[r];
      float* o = to.o + r * plan_.values();
      const float* added = from.o + r * plan_.values();
      for (int64_t i = 0; i < plan_.values(); i += kTileRows) {
        Isa::Store(o + i, Isa::Add(Isa::Load(o + i), Isa::Load(added + i)));
      }
    }
  }

  // output = O / l, where l includes the sink.
  void Finish(int64_t index, float* memory) const {
    const Unit unit = UnitOf(index);
    const Sums sums = SumsAt(memory);
    for (int64_t r = 0; r < unit.rows(); ++r) {
      const int64_t row = unit.begin + r, head = HeadOf(unit, row);
      float l = sums.l[r], factor = 1.0f;
      if (args_.sinks != nullptr) {
        const float sink = args_.sinks[head], m = Finite(std::max(sums.m[r], sink));
        factor = ExpOf(sums.m[r] - m);
        l = l * factor + ExpOf(sink - m);
      }
      Rescale(r, l == 0.0f ? 0.0f : factor / l, sums);
      ConvertRow(args_.dtype, sums.o + r * plan_.values(), args_.value_size,
                 static_cast<std::byte*>(args_.output.data) +
                     args_.output.Row(unit.batch, head, QueryOf(row)) * ByteSize(args_.dtype));
    }
  }

  // Zero instead of minus infinity, so that differences to it are no NaN.
  static float Finite(float m) { return m == -kInfinity ? 0.0f : m; }
  static float ExpOf(float x) {
    alignas(64) float lanes[kTileRows];
    Isa::Store(lanes, Exp<Isa>(Isa::Broadcast(x)));
    return lanes[0];
  }
  static float Greatest(Vec v) {
    alignas(64) float lanes[kTileRows];
    Isa::Store(lanes, v);
    for (int width = kTileRows / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] = std::max(lanes[i], lanes[i + width]);
    }
    return lanes[0];
  }
  static float SumOf(Vec v) {
    alignas(64) float lanes[kTileRows];
    Isa::Store(lanes, v);
    for (int width = kTileRows / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }

  const AttentionArgs& args_;
  const AttentionPlan plan_;
  ThreadPool& pool_;
  ScratchMemory& scratch_;
  float* merged_ = nullptr;  // [units][chunks] sums
};

}  // namespace cpumoe
