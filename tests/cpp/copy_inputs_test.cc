// The copy of a call's inputs.
#include "engine/copy_inputs.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpp/moe_test_util.h"

namespace cpumoe {
namespace {

constexpr MoeConfig kConfig = {
    .num_experts = 4, .hidden_size = 64, .intermediate_size = 96, .glu = {}};

bool BeginsOnCacheLine(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % AlignedBuffer::kCacheLine == 0;
}

TEST(CopyInputs, RowsBecomeDenseAndEachInputBeginsOnACacheLine) {
  for (const BatchSpec& spec :
       {BatchSpec{}, BatchSpec{.tokens = 3, .top_k = 3, .dtype = DType::kBf16},
        BatchSpec{.ids_are_64_bit = false}, BatchSpec{.tokens = 1, .top_k = 1},
        BatchSpec{.dtype = DType::kFp16, .row_gap = 5}}) {
    const Batch batch(kConfig, spec);
    const ForwardArgs before = batch.Args(nullptr);
    ForwardArgs args = before;
    const std::shared_ptr<const void> copy = CopyInputs(args, kConfig.hidden_size);
    EXPECT_TRUE(BeginsOnCacheLine(args.hidden_states));
    EXPECT_TRUE(BeginsOnCacheLine(args.routing.ids));
    EXPECT_TRUE(BeginsOnCacheLine(args.routing.weights));
    EXPECT_EQ(args.hidden_stride, kConfig.hidden_size);
    const int64_t element = ByteSize(spec.dtype);
    for (int64_t t = 0; t < spec.tokens; ++t) {
      const auto row = [&](const ForwardArgs& of) {
        return static_cast<const std::byte*>(of.hidden_states) + t * of.hidden_stride * element;
      };
      EXPECT_EQ(std::memcmp(row(args), row(before), kConfig.hidden_size * element), 0) << t;
    }
    for (int64_t i = 0; i < spec.tokens * spec.top_k; ++i) {
      EXPECT_EQ(args.routing.Id(i), batch.ids[i]);
      EXPECT_EQ(args.routing.weights[i], batch.weights[i]);
    }
  }
}

TEST(CopyInputs, NothingIsReadIfThereIsNothingToRead) {
  ForwardArgs no_tokens = {.routing = {.top_k = 2}};
  EXPECT_NE(CopyInputs(no_tokens, 64), nullptr);
  const std::vector<float> rows(2 * 64, 1.0f);
  ForwardArgs no_slots;
  no_slots.input_dtype = DType::kFp32;
  no_slots.hidden_states = rows.data();
  no_slots.hidden_stride = 64;
  no_slots.tokens = 2;
  const std::shared_ptr<const void> copy = CopyInputs(no_slots, 64);
  EXPECT_EQ(std::memcmp(no_slots.hidden_states, rows.data(), rows.size() * sizeof(float)), 0);
}

}  // namespace
}  // namespace cpumoe
