#include "cpp/stream_test_util.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "fake_cuda/cuda_api.h"
#include "fake_cuda/fake_cuda.h"
#include "streams/cuda_driver.h"
#include "streams/host_driver.h"

namespace cpumoe {
namespace {

void Check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(what) + " failed: " + std::to_string(result));
  }
}
#define CHECKED(call) Check(call, #call)

class HostDevice final : public TestDevice {
 public:
  std::shared_ptr<StreamDriver> driver() override { return std::make_shared<HostDriver>(); }
  StreamHandle NewStream() override { return next_++; }
  void Synchronize(StreamHandle) override {}
  void* Allocate(size_t bytes) override {
    blocks_.push_back(std::make_unique<std::byte[]>(bytes));
    return blocks_.back().get();
  }
  void Write(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void Read(void* to, const void* from, size_t bytes) override { Write(to, from, bytes); }
  void Fill(StreamHandle, void* to, uint8_t value, size_t bytes) override {
    std::memset(to, value, bytes);
  }

 private:
  StreamHandle next_ = 0;
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

CUdeviceptr Address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }
CUstream ToStream(StreamHandle handle) { return reinterpret_cast<CUstream>(handle); }

class RealOrFakeCuda final : public CudaDevice {
 public:
  RealOrFakeCuda() {
    CHECKED(cuInit(0));
    CUdevice device = 0;
    CHECKED(cuDeviceGet(&device, 0));
    CUcontext context = nullptr;
    CHECKED(cuDevicePrimaryCtxRetain(&context, device));
    CHECKED(cuCtxSetCurrent(context));
  }
  ~RealOrFakeCuda() override {
    // Results do not matter: a test may have made the device fail.
    for (const CUgraphExec graph : graphs_) cuGraphExecDestroy(graph);
    for (const CUstream stream : streams_) cuStreamDestroy_v2(stream);
    for (const CUdeviceptr block : blocks_) cuMemFree_v2(block);
  }

  std::shared_ptr<StreamDriver> driver() override { return OpenCudaDriver(); }

  StreamHandle NewStream() override {
    CUstream stream = nullptr;
    CHECKED(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    streams_.push_back(stream);
    return reinterpret_cast<StreamHandle>(stream);
  }
  void Synchronize(StreamHandle stream) override { CHECKED(cuStreamSynchronize(ToStream(stream))); }

  void* Allocate(size_t bytes) override {
    CUdeviceptr block = 0;
    CHECKED(cuMemAlloc_v2(&block, std::max<size_t>(bytes, 1)));
    blocks_.push_back(block);
    return reinterpret_cast<void*>(block);
  }
  void Write(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) CHECKED(cuMemcpyHtoD_v2(Address(to), from, bytes));
  }
  void Read(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) CHECKED(cuMemcpyDtoH_v2(to, Address(from), bytes));
  }
  void Fill(StreamHandle stream, void* to, uint8_t value, size_t bytes) override {
    CHECKED(cuMemsetD8Async(Address(to), value, bytes, ToStream(stream)));
  }

  void BeginCapture(StreamHandle stream) override {
    CHECKED(cuStreamBeginCapture_v2(ToStream(stream), CU_STREAM_CAPTURE_MODE_GLOBAL));
  }
  void* EndCapture(StreamHandle stream) override {
    CUgraph graph = nullptr;
    CHECKED(cuStreamEndCapture(ToStream(stream), &graph));
    CUgraphExec exec = nullptr;
    CHECKED(cuGraphInstantiateWithFlags(&exec, graph, 0));
    CHECKED(cuGraphDestroy(graph));
    graphs_.push_back(exec);
    return exec;
  }
  void Replay(void* graph, StreamHandle stream) override {
    CHECKED(cuGraphLaunch(static_cast<CUgraphExec>(graph), ToStream(stream)));
  }

 private:
  std::vector<CUgraphExec> graphs_;
  std::vector<CUstream> streams_;
  std::vector<CUdeviceptr> blocks_;
};

}  // namespace

std::unique_ptr<TestDevice> MakeHostDevice() { return std::make_unique<HostDevice>(); }
std::unique_ptr<CudaDevice> MakeCudaDevice() { return std::make_unique<RealOrFakeCuda>(); }

DeviceBatch::DeviceBatch(TestDevice& device, const Batch& batch, int64_t hidden_size)
    : device_(device) {
  const BatchSpec& spec = batch.spec();
  const int64_t pairs = spec.tokens * spec.top_k;
  hidden_bytes_ = spec.tokens * hidden_size * ByteSize(spec.dtype);
  id_bytes_ = pairs * (spec.ids_are_64_bit ? 8 : 4);
  weight_bytes_ = pairs * static_cast<int64_t>(sizeof(float));
  output_bytes_ = spec.tokens * hidden_size * ByteSize(spec.OutputDType());
  hidden_states_ = device.Allocate(hidden_bytes_);
  ids_ = device.Allocate(id_bytes_);
  weights_ = device.Allocate(weight_bytes_);
  output_ = device.Allocate(output_bytes_);
  tensors_ = {.hidden_states = hidden_states_,
              .hidden_stride = hidden_size,
              .tokens = spec.tokens,
              .ids = ids_,
              .weights = static_cast<const float*>(weights_),
              .output = output_};
  Set(batch);
}

void DeviceBatch::Set(const Batch& batch) {
  const ForwardArgs args = batch.Args(nullptr);
  device_.Write(hidden_states_, args.hidden_states, hidden_bytes_);
  device_.Write(ids_, args.routing.ids, id_bytes_);
  device_.Write(weights_, args.routing.weights, weight_bytes_);
  const std::vector<std::byte> nan(output_bytes_, std::byte{0xff});
  device_.Write(output_, nan.data(), nan.size());
}

std::vector<std::byte> DeviceBatch::Output() const {
  std::vector<std::byte> output(output_bytes_);
  device_.Read(output.data(), output_, output.size());
  return output;
}

StreamCase::StreamCase(const BatchSpec& spec, const LayerSpec& layer)
    : spec_(spec), layer_(EngineCase(spec, layer).layer()), runtime_(Runtime::Create({})) {}

Batch StreamCase::MakeBatch(uint64_t seed, int64_t tokens) const {
  BatchSpec spec = spec_;
  spec.tokens = tokens;
  return Batch(layer_->config(), spec, seed);
}

Call::Options StreamCase::Options(const Batch& batch) const {
  const ForwardArgs args = batch.Args(nullptr);
  return {.input_dtype = args.input_dtype,
          .output_dtype = args.output_dtype,
          .top_k = args.routing.top_k,
          .ids_are_64_bit = args.routing.ids_are_64_bit,
          .mask = args.routing.mask};
}

std::vector<std::byte> StreamCase::Expected(const Batch& batch) const {
  const Call::Options options = Options(batch);
  std::vector<std::byte> output(batch.spec().tokens * hidden_size() *
                                ByteSize(options.output_dtype));
  const ForwardArgs args = batch.Args(output.data());
  Call(runtime_, layer_, options)
      .Execute({.hidden_states = args.hidden_states,
                .hidden_stride = args.hidden_stride,
                .tokens = args.tokens,
                .ids = args.routing.ids,
                .weights = args.routing.weights,
                .output = output.data()});
  return output;
}

Lane::Options StreamCase::Buffers(int64_t tokens) const {
  const int64_t bytes =
      TransferLayout::BufferBytes(hidden_size(), Options(MakeBatch(1, 1)), tokens);
  return {.buffer_bytes = bytes, .captured_bytes = bytes};
}

namespace fake {
namespace {

// Calls a function of the fake driver. Returns 0 or nothing if the driver is a real one.
template <class Function, class... Args>
auto Ask(const char* name, Args... args) {
  auto* const function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  using Result = decltype(function(args...));
  return function == nullptr ? Result() : function(args...);
}
#define FAKE(name, ...) Ask<decltype(name)>(#name __VA_OPT__(, ) __VA_ARGS__)

}  // namespace

bool Loaded() { return dlsym(RTLD_DEFAULT, "fake_cuda_reset") != nullptr; }
void Reset() { FAKE(fake_cuda_reset); }
void Delay(uint64_t seed, int microseconds) { FAKE(fake_cuda_delay, seed, microseconds); }
void Fail(const std::string& function, int nth, int error) {
  FAKE(fake_cuda_fail, function.c_str(), nth, error);
}
void WaitValues(bool supported) { FAKE(fake_cuda_wait_values, supported ? 1 : 0); }
void Break() { FAKE(fake_cuda_break); }
int64_t HostAllocations() { return FAKE(fake_cuda_host_allocations); }
int64_t Violations() { return FAKE(fake_cuda_violations); }
std::string Violation() {
  const char* const text = FAKE(fake_cuda_first_violation);
  return text == nullptr ? "" : text;
}

}  // namespace fake
}  // namespace cpumoe
