#include "cpp/moe_test_util.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpp/forward_oracle.h"
#include "threading/pinned_pool.h"
#include "threading/topology.h"

namespace cpumoe {
namespace {

std::vector<float> RandomBias(int64_t size, Rng& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> bias(size);
  for (float& b : bias) b = normal(rng);
  return bias;
}

void Store(DType dtype, float value, std::byte* out) {
  if (dtype == DType::kFp32) {
    std::memcpy(out, &value, sizeof(value));
  } else {
    const uint16_t bits =
        dtype == DType::kBf16 ? Bf16::FromFloat(value).bits : Fp16::FromFloat(value).bits;
    std::memcpy(out, &bits, sizeof(bits));
  }
}

double Load(DType dtype, const std::byte* in) {
  if (dtype == DType::kFp32) {
    float value;
    std::memcpy(&value, in, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, in, sizeof(bits));
  return dtype == DType::kBf16 ? Bf16{bits}.ToFloat() : Fp16{bits}.ToFloat();
}

}  // namespace

TestLayer::TestLayer(const std::string& format, const LayerSpec& spec, uint64_t seed)
    : format_(format),
      config_{.num_experts = spec.experts,
              .hidden_size = spec.hidden,
              .intermediate_size = spec.intermediate,
              .glu = spec.glu,
              .has_bias = spec.has_bias,
              .batch_invariant = spec.batch_invariant,
              .few_token_limit = spec.few_token_limit} {
  Rng rng(seed);
  const auto gate_up = [&] {
    return TestMatrix::Random(format, spec.intermediate, spec.hidden, rng, spec.gate_up_scales);
  };
  for (int64_t e = 0; e < spec.experts; ++e) {
    matrices_.push_back(
        {gate_up(), gate_up(),
         TestMatrix::Random(format, spec.hidden, spec.intermediate, rng, spec.down_scales)});
    if (spec.has_bias) {
      biases_.push_back({RandomBias(spec.intermediate, rng), RandomBias(spec.intermediate, rng),
                         RandomBias(spec.hidden, rng)});
    }
  }
}

ExpertSource TestLayer::Source(int64_t expert) const {
  const std::array<TestMatrix, 3>& m = matrices_[expert];
  ExpertSource source = {.gate = {}, .up = m[1].View(), .down = m[2].View()};
  if (config_.glu.gated) source.gate = m[0].View();
  if (config_.has_bias) {
    if (config_.glu.gated) source.gate_bias = biases_[expert][0].data();
    source.up_bias = biases_[expert][1].data();
    source.down_bias = biases_[expert][2].data();
  }
  return source;
}

Batch::Batch(const MoeConfig& config, const BatchSpec& spec, uint64_t seed)
    : hidden_(config.hidden_size), stride_(hidden_ + spec.row_gap), spec_(spec) {
  Rng rng(seed);
  std::normal_distribution<float> normal;
  // The last row has no gap behind it, so that a sanitizer notices reads beyond it.
  const int64_t elements = std::max<int64_t>(0, spec.tokens * stride_ - spec.row_gap);
  hidden_states_.resize(elements * ByteSize(spec.dtype));
  for (int64_t i = 0; i < elements; ++i) {
    // Values between the rows are NaN, which would show in any result that they reached.
    const float value = i % stride_ < hidden_ ? spec.magnitude * normal(rng) : NAN;
    Store(spec.dtype, value, hidden_states_.data() + i * ByteSize(spec.dtype));
  }
  std::vector<int64_t> experts(config.num_experts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t t = 0; t < spec.tokens; ++t) {
    std::shuffle(experts.begin(), experts.end(), rng);
    for (int64_t s = 0; s < spec.top_k; ++s) {
      ids.push_back(experts[s % config.num_experts]);
      weights.push_back(normal(rng));
    }
  }
}

Batch Batch::Only(int64_t token) const {
  Batch one = *this;
  const int64_t element = ByteSize(spec_.dtype);
  const auto row = hidden_states_.begin() + token * stride_ * element;
  one.spec_.tokens = 1;
  one.hidden_states_.assign(row, row + hidden_ * element);
  one.ids.assign(&ids[token * spec_.top_k], &ids[token * spec_.top_k] + spec_.top_k);
  one.weights.assign(&weights[token * spec_.top_k], &weights[token * spec_.top_k] + spec_.top_k);
  return one;
}

double Batch::HiddenState(int64_t token, int64_t k) const {
  return Load(spec_.dtype, hidden_states_.data() + (token * stride_ + k) * ByteSize(spec_.dtype));
}

void Batch::SetHiddenState(int64_t token, int64_t k, float value) {
  Store(spec_.dtype, value, hidden_states_.data() + (token * stride_ + k) * ByteSize(spec_.dtype));
}

ForwardArgs Batch::Args(void* output) const {
  narrow_ids_.assign(ids.begin(), ids.end());
  const void* wide = ids.data();
  return {.routing = {.ids = spec_.ids_are_64_bit ? wide : narrow_ids_.data(),
                      .ids_are_64_bit = spec_.ids_are_64_bit,
                      .weights = weights.data(),
                      .mask = mask.empty() ? nullptr : mask.data(),
                      .top_k = spec_.top_k},
          .input_dtype = spec_.dtype,
          .output_dtype = spec_.OutputDType(),
          .hidden_states = hidden_states_.data(),
          .hidden_stride = stride_,
          .tokens = spec_.tokens,
          .output = output};
}

std::vector<NodeThreads> MadeUpNodes(const std::vector<int>& threads) {
  std::vector<NodeThreads> nodes;
  for (size_t n = 0; n < threads.size(); ++n) {
    nodes.push_back(
        {.memory = {.id = static_cast<int>(n), .threads = threads[n]}, .cpus = ProcessAffinity()});
  }
  return nodes;
}

std::vector<double> Numbers(DType dtype, const std::vector<std::byte>& elements) {
  std::vector<double> numbers;
  for (size_t i = 0; i < elements.size(); i += ByteSize(dtype)) {
    numbers.push_back(Load(dtype, &elements[i]));
  }
  return numbers;
}

std::unique_ptr<Moe> MoeTest::Create(MoeConfig config) const {
  config.precision = precision();
  return std::unique_ptr<Moe>(entry().create(config));
}

std::unique_ptr<Moe> MoeTest::Create(const TestLayer& layer) const {
  std::unique_ptr<Moe> moe = Create(layer.config());
  SerialPool pool;
  for (int64_t e = 0; e < layer.config().num_experts; ++e) moe->Pack(e, layer.Source(e), pool);
  return moe;
}

std::vector<std::byte> MoeTest::Forward(const Moe& moe, const Batch& batch, ThreadPool& pool,
                                        Workspace& workspace) const {
  const int64_t elements = batch.spec().tokens * moe.config().hidden_size;
  // All bits set is NaN in every dtype, so elements that are not written fail the comparison.
  std::vector<std::byte> output(elements * ByteSize(batch.spec().OutputDType()), std::byte{0xff});
  ForwardArgs args = batch.Args(output.data());
  args.fp32_as_bf16 = GetParam().fp32_as_bf16;
  moe.Forward(args, pool, workspace);
  return output;
}

std::vector<std::byte> MoeTest::Forward(const Moe& moe, const Batch& batch) const {
  SerialPool pool;
  Workspace workspace;
  return Forward(moe, batch, pool, workspace);
}

void MoeTest::CheckForward(const Moe& moe, const TestLayer& layer, const Batch& batch) const {
  PinnedPool pool({.threads = 2});
  Workspace workspace;
  const std::vector<std::byte> output = Forward(moe, batch, pool, workspace);
  const bool keeps_fp32 = batch.spec().dtype == DType::kFp32 && !GetParam().fp32_as_bf16;
  const Rounding rounding = {
      keeps_fp32 ? std::numeric_limits<float>::digits : kernels().activation_bits,
      precision() == Precision::kInt8 && kernels().int8, kernels().digits};
  const Expectation expected = Expect(layer, batch, rounding);
  ExpectClose(expected, Numbers(batch.spec().OutputDType(), output), layer.config().hidden_size);
}

void MoeTest::CheckForward(const LayerSpec& layer_spec, const BatchSpec& batch_spec) const {
  SCOPED_TRACE(testing::Message() << "hidden " << layer_spec.hidden << ", intermediate "
                                  << layer_spec.intermediate << ", experts " << layer_spec.experts
                                  << ", top_k " << batch_spec.top_k << ", tokens "
                                  << batch_spec.tokens << ", dtype "
                                  << static_cast<int>(batch_spec.dtype));
  const TestLayer layer(format(), layer_spec);
  CheckForward(*Create(layer), layer, Batch(layer.config(), batch_spec));
}

}  // namespace cpumoe
