// Attention on every ISA, compared with sums in double precision. Python's tests have more cases
// (tests/python/test_attention.py). These run under sanitizers.
#include "attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpp/isa_test.h"
#include "threading/pinned_pool.h"

namespace cpumoe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A tensor [rows, columns] of a dtype, without a byte behind its last element.
struct Rows {
  int64_t columns;
  DType dtype;
  std::vector<std::byte> elements;
  std::vector<float> values;

  Rows(int64_t rows, int64_t columns, DType dtype, std::mt19937& rng)
      : columns(columns), dtype(dtype), elements(rows * columns * ByteSize(dtype)) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * columns; ++i) {
      std::byte* at = elements.data() + i * ByteSize(dtype);
      const auto store = [&](auto element, float value) {
        std::memcpy(at, &element, sizeof(element));
        values.push_back(value);
      };
      const float x = normal(rng);
      if (dtype == DType::kBf16) {
        store(Bf16::FromFloat(x), Bf16::FromFloat(x).ToFloat());
      } else if (dtype == DType::kFp16) {
        store(Fp16::FromFloat(x), Fp16::FromFloat(x).ToFloat());
      } else {
        store(x, x);
      }
    }
  }
};

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, head_size, value_size, window;
  DType dtype = DType::kFp32;
  bool masked = false;
};

class AttentionTest : public IsaTest {
 protected:
  // Heads of a batch follow one another: q [batch, heads, queries, head_size], and so on.
  void Check(const Case& c) {
    const Rows q(c.batch * c.heads * c.queries, c.head_size, c.dtype, rng_);
    const Rows k(c.batch * c.kv_heads * c.keys, c.head_size, c.dtype, rng_);
    const Rows v(c.batch * c.kv_heads * c.keys, c.value_size, c.dtype, rng_);
    const Rows mask(c.queries, c.keys, DType::kFp32, rng_);
    const Rows sinks(1, c.heads, DType::kFp32, rng_);
    const int64_t row_bytes = c.value_size * ByteSize(c.dtype);
    std::vector<std::byte> output(c.batch * c.heads * c.queries * row_bytes);
    const auto view = [](const Rows& rows, int64_t heads, int64_t count) {
      return HeadsOf<const void*>{rows.elements.data(), heads * count * rows.columns,
                                  count * rows.columns, rows.columns};
    };
    const AttentionArgs args = {.dtype = c.dtype,
                                .batch = c.batch,
                                .heads = c.heads,
                                .kv_heads = c.kv_heads,
                                .queries = c.queries,
                                .keys = c.keys,
                                .head_size = c.head_size,
                                .value_size = c.value_size,
                                .scale = 0.5f,
                                .causal = true,
                                .window = c.window,
                                .q = view(q, c.heads, c.queries),
                                .k = view(k, c.kv_heads, c.keys),
                                .v = view(v, c.kv_heads, c.keys),
                                .output = {output.data(), c.heads * c.queries * c.value_size,
                                           c.queries * c.value_size, c.value_size},
                                .mask_type = c.masked ? MaskType::kFp32 : MaskType::kNone,
                                .mask = {mask.elements.data(), 0, 0, c.keys},
                                .sinks = c.masked ? sinks.values.data() : nullptr};
    PinnedPool two({.threads = 2});
    ScratchMemory scratch;
    run_.variant().attend(args, two, scratch);
    const std::vector<std::byte> first = output;
    SerialPool one;
    run_.variant().attend(args, one, scratch);
    EXPECT_EQ(first, output);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h) {
        for (int64_t t = 0; t < c.queries; ++t) {
          const int64_t kv = b * c.kv_heads + h / (c.heads / c.kv_heads);
          const int64_t row = (b * c.heads + h) * c.queries + t;
          CheckRow(c, q.values.data() + row * c.head_size,
                   k.values.data() + kv * c.keys * c.head_size,
                   v.values.data() + kv * c.keys * c.value_size,
                   c.masked ? mask.values.data() + t * c.keys : nullptr,
                   c.masked ? sinks.values[h] : -kInfinity, t, output.data() + row * row_bytes);
        }
      }
    }
  }

  void CheckRow(const Case& c, const float* q, const float* k, const float* v, const float* mask,
                double sink, int64_t t, const std::byte* output) {
    const int64_t end = std::min(t + c.keys - c.queries + 1, c.keys);
    const int64_t begin = c.window == 0 ? 0 : std::max<int64_t>(end - c.window, 0);
    std::vector<double> scores;
    double m = sink;
    for (int64_t j = begin; j < end; ++j) {
      double score = 0;
      for (int64_t i = 0; i < c.head_size; ++i) score += double{q[i]} * k[j * c.head_size + i];
      scores.push_back(0.5 * score + (mask == nullptr ? 0.0 : mask[j]));
      m = std::max(m, scores.back());
    }
    double l = sink == -kInfinity ? 0 : std::exp(sink - m);
    for (double& score : scores) l += score = std::exp(score - m);
    for (int64_t i = 0; i < c.value_size; ++i) {
      double sum = 0, size = 0;
      for (int64_t j = begin; j < end; ++j) {
        const double term = scores[j - begin] / l * v[j * c.value_size + i];
        sum += term;
        size += std::fabs(term);
      }
      double actual = 0;
      VisitElements(c.dtype, output, [&](const auto* elements) {
        if constexpr (std::is_same_v<decltype(elements), const float*>) {
          actual = elements[i];
        } else {
          actual = elements[i].ToFloat();
        }
      });
      const double roundoff = c.dtype == DType::kBf16   ? 0x1p-8
                              : c.dtype == DType::kFp16 ? 0x1p-11
                                                        : 0.0;
      const double units = static_cast<double>(16 * c.head_size + 4 * c.keys + 64);
      ASSERT_NEAR(actual, sum, 0x1p-24 * units * size + roundoff * std::fabs(sum) + 0x1p-24)
          << "query " << t << ", value " << i;
    }
  }

  std::mt19937 rng_{11};
};
CPUMOE_FOR_EACH_ISA(AttentionTest);

TEST_P(AttentionTest, Decoding) {
  Check({.batch = 2,
         .heads = 6,
         .kv_heads = 2,
         .queries = 1,
         .keys = 300,
         .head_size = 24,
         .value_size = 20,
         .window = 0,
         .dtype = DType::kBf16});
  Check({.batch = 1,
         .heads = 5,
         .kv_heads = 1,
         .queries = 2,
         .keys = 270,
         .head_size = 33,
         .value_size = 7,
         .window = 140,
         .dtype = DType::kFp16});
  Check({.batch = 1,
         .heads = 2,
         .kv_heads = 2,
         .queries = 1,
         .keys = 261,
         .head_size = 16,
         .value_size = 16,
         .window = 0,
         .masked = true});
}

TEST_P(AttentionTest, Prefill) {
  Check({.batch = 1,
         .heads = 4,
         .kv_heads = 2,
         .queries = 70,
         .keys = 90,
         .head_size = 20,
         .value_size = 17,
         .window = 0,
         .dtype = DType::kBf16});
  Check({.batch = 2,
         .heads = 3,
         .kv_heads = 3,
         .queries = 41,
         .keys = 41,
         .head_size = 9,
         .value_size = 33,
         .window = 8,
         .masked = true});
  Check({.batch = 1,
         .heads = 2,
         .kv_heads = 1,
         .queries = 30,
         .keys = 12,
         .head_size = 8,
         .value_size = 8,
         .window = 0,
         .dtype = DType::kFp16});
}

}  // namespace
}  // namespace cpumoe
