// Weighted sums through the engine, which checks what it is given.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpp/message_of.h"
#include "engine/weighted_sums.h"

namespace cpumoe {
namespace {

class EngineWeightedSums : public testing::Test {
 protected:
  WeightedSumArgs Args() {
    return {.tokens = 2,
            .columns = 3,
            .terms = terms_.data(),
            .num_rows = 3,
            .begins = begins_.data(),
            .rows = rows_.data(),
            .weights = weights_.data(),
            .output = sums_.data()};
  }
  std::string Message(const WeightedSumArgs& args) {
    return MessageOf<std::invalid_argument>([&] { engine_.Execute(*runtime_, args); });
  }

  std::shared_ptr<Runtime> runtime_ = Runtime::Create({.node = {.threads = 2}});
  const WeightedSums engine_{"generic", "test"};
  std::vector<float> terms_ = {1, 2, 3, 10, 20, 30, 100, 200, 300};
  std::vector<int64_t> begins_ = {0, 2, 3}, rows_ = {2, 0, 1};
  std::vector<float> weights_ = {2, 1, -1}, sums_ = std::vector<float>(6);
};

TEST_F(EngineWeightedSums, ManyThreadsShareARuntime) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this] {
      std::vector<float> sums(6);
      WeightedSumArgs args = Args();
      args.output = sums.data();
      for (int call = 0; call < 50; ++call) engine_.Execute(*runtime_, args);
      EXPECT_EQ(sums, (std::vector<float>{201, 402, 603, -10, -20, -30}));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(EngineWeightedSums, NothingToAdd) {
  engine_.Execute(*runtime_, {});
  begins_ = {0, 0, 0};
  WeightedSumArgs args = Args();
  args.terms = nullptr;
  args.rows = nullptr;
  args.weights = nullptr;
  args.num_rows = 0;
  sums_.assign(6, 7.0f);
  engine_.Execute(*runtime_, args);
  EXPECT_EQ(sums_, std::vector<float>(6));
}

TEST_F(EngineWeightedSums, WrongArgumentsAreRefused) {
  const auto without = [&](auto member, const char* name) {
    WeightedSumArgs args = Args();
    args.*member = nullptr;
    EXPECT_EQ(Message(args), std::string(name) + ": expected an address, got a null pointer");
  };
  without(&WeightedSumArgs::terms, "terms");
  without(&WeightedSumArgs::begins, "begins");
  without(&WeightedSumArgs::rows, "rows");
  without(&WeightedSumArgs::weights, "weights");
  without(&WeightedSumArgs::output, "output");
  WeightedSumArgs args = Args();
  args.tokens = -1;
  EXPECT_EQ(Message(args), "tokens: expected 0 to 4294967296, got -1");
  args = Args();
  args.columns = int64_t{1} << 40;
  EXPECT_EQ(Message(args), "columns: expected 0 to 16777216, got 1099511627776");
  for (const int64_t row : {-1, 3}) {
    rows_[1] = row;
    EXPECT_EQ(MessageOf<std::out_of_range>([&] { engine_.Execute(*runtime_, Args()); }),
              "rows[1]: expected 0 to 2, got " + std::to_string(row));
  }
  rows_[1] = 0;
  begins_ = {0, 3, 2};
  EXPECT_EQ(Message(Args()), "begins: expected ascending numbers from 0 to 4294967296, got 2");
  begins_ = {1, 2, 3};
  EXPECT_EQ(Message(Args()), "begins: expected ascending numbers from 0 to 4294967296, got 1");
  begins_ = {0, 2, 3};
  runtime_->Close();
  EXPECT_EQ(MessageOf<std::runtime_error>([&] { engine_.Execute(*runtime_, Args()); }),
            "this Runtime is closed; create a new one");
}

}  // namespace
}  // namespace cpumoe
