// Devices with streams, and calls on them, for the tests of the bridge.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpp/engine_test_util.h"
#include "streams/bridge.h"
#include "streams/stream_call.h"
#include "streams/stream_driver.h"

namespace cpumoe {

// Memory and streams.
class TestDevice {
 public:
  virtual ~TestDevice() = default;

  virtual std::shared_ptr<StreamDriver> driver() = 0;
  virtual StreamHandle NewStream() = 0;
  virtual void Synchronize(StreamHandle stream) = 0;

  // Memory that lives as long as the device.
  virtual void* Allocate(size_t bytes) = 0;
  // Immediately, for idle streams.
  virtual void Write(void* to, const void* from, size_t bytes) = 0;
  virtual void Read(void* to, const void* from, size_t bytes) = 0;
  // In the stream's order.
  virtual void Fill(StreamHandle stream, void* to, uint8_t value, size_t bytes) = 0;
};

// The CPU: an operation has run when its function returns.
std::unique_ptr<TestDevice> MakeHostDevice();

// CUDA's driver library, which is the fake one unless LD_LIBRARY_PATH names another.
class CudaDevice : public TestDevice {
 public:
  virtual void BeginCapture(StreamHandle stream) = 0;
  // The graph that was captured, which lives as long as the device.
  virtual void* EndCapture(StreamHandle stream) = 0;
  virtual void Replay(void* graph, StreamHandle stream) = 0;
};
std::unique_ptr<CudaDevice> MakeCudaDevice();

// The tensors of a batch in a device's memory.
class DeviceBatch {
 public:
  DeviceBatch(TestDevice& device, const Batch& batch, int64_t hidden_size);

  const Call::Tensors& tensors() const { return tensors_; }
  int64_t output_bytes() const { return output_bytes_; }
  int64_t id_bytes() const { return id_bytes_; }

  // Replaces the inputs and fills the output with NaN. Shapes and types stay. The streams are idle.
  void Set(const Batch& batch);
  std::vector<std::byte> Output() const;

 private:
  TestDevice& device_;
  int64_t hidden_bytes_, id_bytes_, weight_bytes_, output_bytes_;
  void* hidden_states_;
  void* ids_;
  void* weights_;
  void* output_;
  Call::Tensors tensors_;
};

// A layer, batches for it, and what a call without a stream gives.
class StreamCase {
 public:
  explicit StreamCase(const BatchSpec& spec = {}, const LayerSpec& layer = {});

  const std::shared_ptr<Layer>& layer() const { return layer_; }
  int64_t hidden_size() const { return layer_->config().hidden_size; }

  Batch MakeBatch(uint64_t seed) const { return MakeBatch(seed, spec_.tokens); }
  Batch MakeBatch(uint64_t seed, int64_t tokens) const;
  Call::Options Options(const Batch& batch) const;
  std::vector<std::byte> Expected(const Batch& batch) const;
  // The sizes of buffers for `tokens` tokens.
  Lane::Options Buffers(int64_t tokens) const;

 private:
  BatchSpec spec_;
  std::shared_ptr<Layer> layer_;
  std::shared_ptr<Runtime> runtime_;
};

// The fake driver's own functions. With a real driver they do nothing.
namespace fake {
bool Loaded();
void Reset();
void Delay(uint64_t seed, int microseconds);
void Fail(const std::string& function, int nth, int error);
void WaitValues(bool supported);
void Break();
int64_t HostAllocations();
int64_t Violations();
// The text of the first violation; empty if there was none.
std::string Violation();
}  // namespace fake

// Resets the fake driver before a derived class makes its members, and expects no violation of a
// test.
class StreamTest : public testing::Test {
 protected:
  StreamTest() { fake::Reset(); }
  void TearDown() override { EXPECT_EQ(fake::Violation(), ""); }
};

}  // namespace cpumoe
