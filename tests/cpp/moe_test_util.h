// Layers of experts with random weights, calls of their forward pass, and the fixture that runs
// them on one ISA and format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpp/isa_test.h"
#include "cpp/test_matrix.h"
#include "moe/moe.h"
#include "threading/pinned_pool.h"

namespace cpumoe {

inline constexpr Glu kPlain = {};
inline constexpr Glu kDeepSeekV4 = {.limit = 10.0f};
inline constexpr Glu kGemma = {.function = GluFunction::kGeluTanh};
inline constexpr Glu kGelu = {.function = GluFunction::kGelu};
inline constexpr Glu kRelu2 = {.function = GluFunction::kRelu2, .limit = 5.0f};
inline constexpr Glu kUngatedRelu2 = {.function = GluFunction::kRelu2, .gated = false};
inline constexpr Glu kUngatedGelu = {.function = GluFunction::kGelu, .gated = false};
inline constexpr Glu kSoftCapped = {
    .function = GluFunction::kSoftCappedSilu, .gate_cap = 4.0f, .up_cap = 25.0f};
inline constexpr Glu kGptOss = {.alpha = 1.702f, .limit = 7.0f, .up_offset = 1.0f};

struct LayerSpec {
  int64_t experts = 4;
  int64_t hidden = 64;
  int64_t intermediate = 96;
  Glu glu = kPlain;
  bool has_bias = false;
  bool batch_invariant = false;
  int few_token_limit = -1;
  Magnitudes gate_up_scales = kModerate;
  Magnitudes down_scales = kModerate;
};

// A layer of experts in the form in which a checkpoint holds them.
class TestLayer {
 public:
  TestLayer(const std::string& format, const LayerSpec& spec, uint64_t seed = 1);

  const MoeConfig& config() const { return config_; }
  const std::string& format() const { return format_; }
  ExpertSource Source(int64_t expert) const;
  const TestMatrix& Matrix(int64_t expert, int which) const { return matrices_[expert][which]; }

 private:
  std::string format_;
  MoeConfig config_;
  std::vector<std::array<TestMatrix, 3>> matrices_;        // gate, up, down
  std::vector<std::array<std::vector<float>, 3>> biases_;  // gate, up, down, or none
};

struct BatchSpec {
  int64_t tokens = 5;
  int64_t top_k = 2;
  DType dtype = DType::kFp32;              // of hidden_states
  std::optional<DType> output_dtype = {};  // of the output; none: as hidden_states
  bool ids_are_64_bit = true;
  int64_t row_gap = 0;     // elements between the rows of hidden_states
  float magnitude = 1.0f;  // of hidden_states

  DType OutputDType() const { return output_dtype.value_or(dtype); }
};

// The input tensors of a forward call. Ids and the mask may be changed before the call.
class Batch {
 public:
  // Makes random hidden states and weights. The ids of a token are distinct as far as there are
  // experts.
  Batch(const MoeConfig& config, const BatchSpec& spec, uint64_t seed = 2);

  // Returns one token of this batch as a batch of its own.
  Batch Only(int64_t token) const;

  const BatchSpec& spec() const { return spec_; }
  double HiddenState(int64_t token, int64_t k) const;
  void SetHiddenState(int64_t token, int64_t k, float value);
  ForwardArgs Args(void* output) const;

  std::vector<int64_t> ids;    // [tokens, top_k]
  std::vector<float> weights;  // [tokens, top_k]
  std::vector<uint8_t> mask;   // [experts], or empty

 private:
  int64_t hidden_, stride_;
  BatchSpec spec_;
  std::vector<std::byte> hidden_states_;
  mutable std::vector<int32_t> narrow_ids_;
};

// Nodes with so many threads, which may run on any CPU.
std::vector<NodeThreads> MadeUpNodes(const std::vector<int>& threads);

// Converts elements of any dtype to doubles.
std::vector<double> Numbers(DType dtype, const std::vector<std::byte>& elements);

class MoeTest : public IsaFormatTest {
 protected:
  // Makes the operator for `config` with the test's precision, without weights.
  std::unique_ptr<Moe> Create(MoeConfig config) const;
  // Makes the operator for `layer` and packs all its experts.
  std::unique_ptr<Moe> Create(const TestLayer& layer) const;

  // Runs the forward pass and returns the output tensor.
  std::vector<std::byte> Forward(const Moe& moe, const Batch& batch, ThreadPool& pool,
                                 Workspace& workspace) const;
  // Runs the forward pass on the calling thread, in a workspace of its own.
  std::vector<std::byte> Forward(const Moe& moe, const Batch& batch) const;

  // Compares the forward pass, on two threads, with the reference.
  void CheckForward(const Moe& moe, const TestLayer& layer, const Batch& batch) const;
  void CheckForward(const LayerSpec& layer, const BatchSpec& batch) const;
};

}  // namespace cpumoe
