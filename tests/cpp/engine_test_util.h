// Layers, calls and their expected results for the tests of the engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpp/moe_test_util.h"
#include "engine/call.h"
#include "engine/layer.h"
#include "engine/runtime.h"

namespace cpumoe {

// A packed layer, a batch for it, and what the batch's call gives.
class EngineCase {
 public:
  explicit EngineCase(const BatchSpec& spec = {}, const LayerSpec& layer = {});

  const std::shared_ptr<Layer>& layer() const { return layer_; }
  const Batch& batch() const { return batch_; }
  Batch& batch() { return batch_; }
  const std::vector<std::byte>& expected() const { return expected_; }

  // An output to write to, filled with NaN.
  std::vector<std::byte> Output() const;

  Call::Options Options() const;
  Call::Tensors Tensors(std::vector<std::byte>& output) const;

 private:
  TestLayer weights_;
  Batch batch_;
  std::shared_ptr<Layer> layer_;
  std::vector<std::byte> expected_;
};

// The message of the exception, "no exception" if there is none.
std::string MessageOf(const std::exception_ptr& error);
std::string MessageOf(const std::function<void()>& body);

}  // namespace cpumoe
