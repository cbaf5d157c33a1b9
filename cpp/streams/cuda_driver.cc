#include "streams/cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>

#include "base/check.h"

namespace cpumoe {
namespace {

// The types and constants of cuda.h, as the binary interface has them.
using Result = int;
using Context = void*;
using Stream = void*;
using DevicePointer = unsigned long long;

constexpr Result kSuccess = 0;
constexpr Result kNotSupported = 801;
constexpr int kCaptureNone = 0;
constexpr int kCaptureModeRelaxed = 2;
constexpr unsigned kPortable = 1, kDeviceMap = 2;
constexpr unsigned kWaitEqual = 1;

// The functions' names end in the version of their binary interface.
struct Functions {
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxPushCurrent_v2)(Context);
  Result (*cuCtxPopCurrent_v2)(Context*);
  Result (*cuCtxSynchronize)();
  Result (*cuGetErrorName)(Result, const char**);
  Result (*cuLaunchHostFunc)(Stream, void (*)(void*), void*);
  Result (*cuMemFreeHost)(void*);
  Result (*cuMemHostAlloc)(void**, size_t, unsigned);
  Result (*cuMemcpyAsync)(DevicePointer, DevicePointer, size_t, Stream);
  Result (*cuStreamGetCaptureInfo_v2)(Stream, int*, uint64_t*, void**, const void**, size_t*);
  Result (*cuThreadExchangeStreamCaptureMode)(int*);
  Result (*cuStreamWaitValue32_v2)(Stream, DevicePointer, uint32_t, unsigned);  // may be null
};

template <class Function>
void Find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

template <class Function>
void FindRequired(void* library, const char* name, Function*& function) {
  Find(library, name, function);
  if (function == nullptr) {
    throw std::runtime_error(
        Message("CUDA: a driver of CUDA 11.4 or newer is needed; the loaded "
                "libcuda.so.1 has no function ",
                name, "; update the GPU's driver"));
  }
}

Functions Load() {
  // The library stays open for the life of the process.
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    throw std::runtime_error(
        "CUDA: this process has not loaded libcuda.so.1; use the GPU first, e.g. with "
        "torch.cuda.init(), or pass CPU tensors");
  }
  Functions functions;
#define CPUMOE_FIND(name) FindRequired(library, #name, functions.name)
  CPUMOE_FIND(cuCtxGetCurrent);
  CPUMOE_FIND(cuCtxPushCurrent_v2);
  CPUMOE_FIND(cuCtxPopCurrent_v2);
  CPUMOE_FIND(cuCtxSynchronize);
  CPUMOE_FIND(cuGetErrorName);
  CPUMOE_FIND(cuLaunchHostFunc);
  CPUMOE_FIND(cuMemFreeHost);
  CPUMOE_FIND(cuMemHostAlloc);
  CPUMOE_FIND(cuMemcpyAsync);
  CPUMOE_FIND(cuStreamGetCaptureInfo_v2);
  CPUMOE_FIND(cuThreadExchangeStreamCaptureMode);
#undef CPUMOE_FIND
  Find(library, "cuStreamWaitValue32_v2", functions.cuStreamWaitValue32_v2);
  return functions;
}

Stream ToStream(StreamHandle handle) { return reinterpret_cast<Stream>(handle); }
DevicePointer ToPointer(const void* address) { return reinterpret_cast<uintptr_t>(address); }

class CudaDriver final : public StreamDriver {
 public:
  CudaDriver() : cuda_(Load()) {
    Check(cuda_.cuCtxGetCurrent(&context_), "cuCtxGetCurrent");
    if (context_ == nullptr) {
      throw std::runtime_error(
          "CUDA: no context is current on this thread; use the GPU on this thread first, e.g. with "
          "torch.cuda.current_stream()");
    }
  }

  std::optional<uint64_t> CaptureId(StreamHandle stream) override {
    const CurrentContext current(*this);
    int status = kCaptureNone;
    uint64_t id = 0;
    Check(
        cuda_.cuStreamGetCaptureInfo_v2(ToStream(stream), &status, &id, nullptr, nullptr, nullptr),
        "cuStreamGetCaptureInfo");
    return status == kCaptureNone ? std::nullopt : std::optional(id);
  }

  std::byte* AllocateHost(size_t bytes) override {
    const CurrentContext current(*this);
    const RelaxedCapture relaxed(cuda_);
    void* memory = nullptr;
    // All of CUDA's 64-bit platforms have one address space, so that a device may use this address.
    Check(cuda_.cuMemHostAlloc(&memory, bytes, kPortable | kDeviceMap), "cuMemHostAlloc");
    return static_cast<std::byte*>(memory);
  }

  void FreeHost(std::byte* memory) noexcept override {
    const CurrentContext current(*this);
    const RelaxedCapture relaxed(cuda_);
    cuda_.cuMemFreeHost(memory);
  }

  void CopyToHost(StreamHandle stream, void* host, const void* device, size_t bytes) override {
    Copy(stream, host, device, bytes);
  }

  void CopyToDevice(StreamHandle stream, void* device, const void* host, size_t bytes) override {
    Copy(stream, device, host, bytes);
  }

  void Launch(StreamHandle stream, HostFunction function, void* data) override {
    const CurrentContext current(*this);
    Check(cuda_.cuLaunchHostFunc(ToStream(stream), function, data), "cuLaunchHostFunc");
  }

  bool WaitForValue(StreamHandle stream, const std::atomic<uint32_t>& word,
                    uint32_t value) override {
    if (cuda_.cuStreamWaitValue32_v2 == nullptr) return false;
    const CurrentContext current(*this);
    const Result result =
        cuda_.cuStreamWaitValue32_v2(ToStream(stream), ToPointer(&word), value, kWaitEqual);
    if (result == kNotSupported) return false;
    Check(result, "cuStreamWaitValue32");
    return true;
  }

  bool Synchronize() noexcept override {
    const CurrentContext current(*this);
    const RelaxedCapture relaxed(cuda_);
    return cuda_.cuCtxSynchronize() == kSuccess;
  }

 private:
  // Makes the context current on this thread, which may have another one or none.
  class CurrentContext {
   public:
    explicit CurrentContext(const CudaDriver& driver)
        : cuda_(driver.cuda_), pushed_(cuda_.cuCtxPushCurrent_v2(driver.context_) == kSuccess) {}
    ~CurrentContext() {
      Context popped = nullptr;
      if (pushed_) cuda_.cuCtxPopCurrent_v2(&popped);
    }
    CurrentContext(const CurrentContext&) = delete;
    CurrentContext& operator=(const CurrentContext&) = delete;

   private:
    const Functions& cuda_;
    const bool pushed_;
  };

  // Lets this thread leave the captures of other threads alone.
  class RelaxedCapture {
   public:
    explicit RelaxedCapture(const Functions& cuda) : cuda_(cuda) { Exchange(); }
    ~RelaxedCapture() { Exchange(); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

   private:
    void Exchange() { cuda_.cuThreadExchangeStreamCaptureMode(&mode_); }

    const Functions& cuda_;
    int mode_ = kCaptureModeRelaxed;
  };

  void Copy(StreamHandle stream, const void* to, const void* from, size_t bytes) const {
    const CurrentContext current(*this);
    Check(cuda_.cuMemcpyAsync(ToPointer(to), ToPointer(from), bytes, ToStream(stream)),
          "cuMemcpyAsync");
  }

  void Check(Result result, const char* function) const {
    if (result == kSuccess) return;
    const char* name = nullptr;
    if (cuda_.cuGetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown error";
    throw std::runtime_error(Message("CUDA: ", function, " failed: ", name, " (", result, ")"));
  }

  const Functions cuda_;
  Context context_ = nullptr;
};

}  // namespace

std::shared_ptr<StreamDriver> OpenCudaDriver() { return std::make_shared<CudaDriver>(); }

}  // namespace cpumoe
