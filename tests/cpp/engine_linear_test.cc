// Calls of a dense matrix through the engine.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpp/message_of.h"
#include "cpp/test_matrix.h"
#include "engine/linear_layer.h"

namespace cpumoe {
namespace {

constexpr int64_t kRows = 48, kColumns = 64;

std::shared_ptr<Runtime> TwoThreads() { return Runtime::Create({.node = {.threads = 2}}); }

class EngineLinear : public testing::Test {
 protected:
  EngineLinear() {
    Rng rng(3);
    matrix_ = std::make_unique<TestMatrix>(TestMatrix::Random("mxfp4", kRows, kColumns, rng));
    layer_ =
        LinearLayer::Create(*runtime_, "generic", "test", "mxfp4", matrix_->View(), nullptr, {});
    std::normal_distribution<float> normal;
    for (float& x : x_) x = normal(rng);
  }

  std::vector<float> Compute(Runtime& runtime) const {
    std::vector<float> y(3 * kRows);
    const LinearCall call(runtime.shared_from_this(), layer_,
                          {.input_dtype = DType::kFp32, .output_dtype = DType::kFp32});
    call.Execute(x_.data(), kColumns, 3, y.data(), kRows);
    return y;
  }

  std::shared_ptr<Runtime> runtime_ = TwoThreads();
  std::unique_ptr<TestMatrix> matrix_;
  std::shared_ptr<const LinearLayer> layer_;
  std::vector<float> x_ = std::vector<float>(3 * kColumns);
};

TEST_F(EngineLinear, ManyThreadsCallOneLayer) {
  const std::vector<float> expected = Compute(*runtime_);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < 50; ++call) EXPECT_EQ(Compute(*runtime_), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Compute(*TwoThreads()), expected);
}

TEST_F(EngineLinear, TheMatrixComesBackBitForBit) {
  TestMatrix out("mxfp4", kRows, kColumns);
  layer_->Unpack(*runtime_, out.MutableView());
  EXPECT_TRUE(out == *matrix_);
}

TEST_F(EngineLinear, WrongArgumentsAreRefused) {
  std::vector<float> y(kRows);
  const LinearCall call(runtime_, layer_, {.input_dtype = DType::kFp32});
  const auto message = [&](const void* x, int64_t stride, int64_t tokens, void* output) {
    return MessageOf<std::invalid_argument>(
        [&] { call.Execute(x, stride, tokens, output, kRows); });
  };
  EXPECT_EQ(message(nullptr, kColumns, 1, y.data()), "x: expected an address, got a null pointer");
  EXPECT_EQ(message(x_.data(), kColumns, 1, nullptr),
            "output: expected an address, got a null pointer");
  EXPECT_EQ(message(x_.data(), kColumns, -1, y.data()), "tokens: expected 0 or more, got -1");
  EXPECT_EQ(message(nullptr, kColumns, 0, nullptr), "no exception");
  runtime_->Close();
  EXPECT_EQ(
      MessageOf<std::runtime_error>([&] { call.Execute(x_.data(), kColumns, 1, y.data(), kRows); }),
      "this Runtime is closed; create a new one");
}

}  // namespace
}  // namespace cpumoe
