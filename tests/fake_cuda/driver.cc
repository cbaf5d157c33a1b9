// The fake driver's functions. Streams run their operations on threads, one thread runs the host
// functions of all streams, and each misuse is counted.
#include <cstring>
#include <set>
#include <utility>

#include "fake_cuda/device.h"
#include "fake_cuda/fake_cuda.h"

using fake_cuda::callbacks;
using fake_cuda::memory;
using fake_cuda::Memory;
using fake_cuda::observer;
using fake_cuda::Operation;
using fake_cuda::Worker;

struct CUctx_st {};
struct CUgraph_st {
  std::vector<Operation> operations;
};
struct CUgraphExec_st {
  std::vector<Operation> operations;
};

struct CUstream_st {
  struct Capture {
    uint64_t id;
    std::thread::id thread;
    std::vector<Operation> operations;
  };
  std::mutex mutex;  // guards capture
  std::optional<Capture> capture;
  Worker worker;  // last, because its operations use the members above
};

namespace {

thread_local bool in_host_function = false;
thread_local int capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
thread_local std::vector<CUcontext> contexts;

CUctx_st the_context;

struct Streams {
  std::mutex mutex;
  std::set<CUstream> all;
};
Streams& streams() {
  static Streams& instance = *new Streams;
  return instance;
}

// Stream 0 is a stream, too.
CUstream Resolve(CUstream stream) {
  if (stream != nullptr) return stream;
  static CUstream_st& legacy = *new CUstream_st;
  return &legacy;
}

std::vector<CUstream> AllStreams() {
  const std::lock_guard lock(streams().mutex);
  std::vector<CUstream> all(streams().all.begin(), streams().all.end());
  all.push_back(Resolve(nullptr));
  return all;
}

// Whether a capture forbids this thread what could disturb it. Any allocation by the thread that
// captures counts, although a real driver allows it in relaxed mode: the bridge promises not to.
bool CaptureForbids() {
  for (const CUstream stream : AllStreams()) {
    const std::lock_guard lock(stream->mutex);
    if (!stream->capture.has_value()) continue;
    if (capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED ||
        stream->capture->thread == std::this_thread::get_id()) {
      return true;
    }
  }
  return false;
}

CUresult Enter(const char* function) {
  if (in_host_function) {
    observer().Violate(std::string(function) + " was called in a host function");
    return CUDA_ERROR_NOT_PERMITTED;
  }
  if (observer().broken) return CUDA_ERROR_ILLEGAL_ADDRESS;
  return observer().Enter(function);
}

// Enter for functions that need a current context.
CUresult EnterInContext(const char* function) {
  if (const CUresult result = Enter(function); result != CUDA_SUCCESS) return result;
  const bool has_context = !contexts.empty() && contexts.back() != nullptr;
  return has_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

// Enter for functions that allocate or free.
CUresult EnterAllocation(const char* function) {
  if (const CUresult result = EnterInContext(function); result != CUDA_SUCCESS) return result;
  if (!CaptureForbids()) return CUDA_SUCCESS;
  observer().Violate(std::string(function) + " was called during a capture");
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

// Records the operation, or lets the stream run it.
void Queue(CUstream stream, Operation operation) {
  stream = Resolve(stream);
  Operation step = [operation = std::move(operation)] {
    observer().Pause();
    if (!observer().broken) operation();
  };
  {
    const std::lock_guard lock(stream->mutex);
    if (stream->capture.has_value()) {
      stream->capture->operations.push_back(std::move(step));
      return;
    }
  }
  stream->worker.Push(std::move(step));
}

// Whether a copy names memory that a driver can reach. Asked when a copy is queued and when it
// runs.
bool MayCopy(const Memory::Place& to, const Memory::Place& from, const char* when) {
  if (to.bytes == nullptr || from.bytes == nullptr) {
    observer().Violate(
        std::string("a copy uses memory that is neither page-locked nor a device's, ") + when);
    return false;
  }
  return true;
}

void RunHostFunction(void (*function)(void*), void* data) {
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  callbacks().Push([&] {
    in_host_function = true;
    function(data);
    in_host_function = false;
    // Notified under the mutex, because the waiting thread's stack has both.
    const std::lock_guard lock(mutex);
    done = true;
    ended.notify_one();
  });
  std::unique_lock lock(mutex);
  ended.wait(lock, [&] { return done; });
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return Enter("cuInit"); }

CUresult cuDeviceGet(CUdevice* device, int) {
  *device = 0;
  return Enter("cuDeviceGet");
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  static const std::map<CUresult, const char*> kNames = {
      {CUDA_SUCCESS, "CUDA_SUCCESS"},
      {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
      {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
      {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED"},
      {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
      {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  const auto found = kNames.find(error);
  if (found == kNames.end()) return CUDA_ERROR_INVALID_VALUE;
  *name = found->second;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = &the_context;
  return Enter("cuDevicePrimaryCtxRetain");
}

CUresult cuCtxSetCurrent(CUcontext context) {
  contexts.assign(1, context);
  return Enter("cuCtxSetCurrent");
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return Enter("cuCtxGetCurrent");
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  if (const CUresult result = Enter("cuCtxPushCurrent"); result != CUDA_SUCCESS) return result;
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (const CUresult result = Enter("cuCtxPopCurrent"); result != CUDA_SUCCESS) return result;
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  if (const CUresult result = EnterInContext("cuCtxSynchronize"); result != CUDA_SUCCESS)
    return result;
  if (CaptureForbids()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  for (const CUstream stream : AllStreams()) stream->worker.AwaitIdle();
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  if (const CUresult result = EnterAllocation("cuMemAlloc"); result != CUDA_SUCCESS) return result;
  *address = memory().AllocateDevice(bytes);
  return *address == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  if (const CUresult result = EnterAllocation("cuMemFree"); result != CUDA_SUCCESS) return result;
  return memory().FreeDevice(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned) {
  if (const CUresult result = EnterAllocation("cuMemHostAlloc"); result != CUDA_SUCCESS) {
    return result;
  }
  *address = memory().AllocateHost(bytes);
  return *address == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
  if (const CUresult result = EnterAllocation("cuMemFreeHost"); result != CUDA_SUCCESS) {
    return result;
  }
  return memory().FreeHost(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  if (const CUresult result = EnterInContext("cuMemcpyHtoD"); result != CUDA_SUCCESS) return result;
  const Memory::Place place = memory().Find(to, bytes);
  if (!place.is_device) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(place.bytes, from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  if (const CUresult result = EnterInContext("cuMemcpyDtoH"); result != CUDA_SUCCESS) return result;
  const Memory::Place place = memory().Find(from, bytes);
  if (!place.is_device) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(to, place.bytes, bytes);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  if (const CUresult result = EnterInContext("cuStreamCreate"); result != CUDA_SUCCESS)
    return result;
  *stream = new CUstream_st;
  const std::lock_guard lock(streams().mutex);
  streams().all.insert(*stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  if (const CUresult result = EnterInContext("cuStreamDestroy"); result != CUDA_SUCCESS)
    return result;
  {
    const std::lock_guard lock(streams().mutex);
    streams().all.erase(stream);
  }
  delete stream;
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  if (const CUresult result = EnterInContext("cuStreamSynchronize"); result != CUDA_SUCCESS)
    return result;
  if (CaptureForbids()) {
    observer().Violate("cuStreamSynchronize was called during a capture");
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  Resolve(stream)->worker.AwaitIdle();
  return observer().broken ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_SUCCESS;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  if (const CUresult result = EnterInContext("cuMemcpyAsync"); result != CUDA_SUCCESS)
    return result;
  if (!MayCopy(memory().Find(to, bytes), memory().Find(from, bytes), "when it is queued")) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Queue(stream, [=] {
    const Memory::Place target = memory().Find(to, bytes), source = memory().Find(from, bytes);
    if (MayCopy(target, source, "when it runs")) std::memcpy(target.bytes, source.bytes, bytes);
  });
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  if (const CUresult result = EnterInContext("cuMemsetD8Async"); result != CUDA_SUCCESS)
    return result;
  Queue(stream, [=] {
    const Memory::Place place = memory().Find(to, bytes);
    if (MayCopy(place, place, "when it runs")) std::memset(place.bytes, value, bytes);
  });
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* data) {
  if (const CUresult result = EnterInContext("cuLaunchHostFunc"); result != CUDA_SUCCESS)
    return result;
  Queue(stream, [=] { RunHostFunction(function, data); });
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, unsigned) {
  if (const CUresult result = EnterInContext("cuStreamWaitValue32"); result != CUDA_SUCCESS)
    return result;
  if (!observer().waits_for_values) return CUDA_ERROR_NOT_SUPPORTED;
  Queue(stream, [=] {
    while (!observer().broken) {
      const Memory::Place word = memory().Find(address, sizeof(uint32_t));
      if (!MayCopy(word, word, "in a wait")) return;
      const auto* const target = reinterpret_cast<const uint32_t*>(word.bytes);
      if (__atomic_load_n(target, __ATOMIC_ACQUIRE) == value) return;
      std::this_thread::yield();
    }
  });
  return CUDA_SUCCESS;
}

CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, unsigned) {
  if (const CUresult result = EnterInContext("cuStreamWriteValue32"); result != CUDA_SUCCESS)
    return result;
  if (!observer().waits_for_values) return CUDA_ERROR_NOT_SUPPORTED;
  Queue(stream, [=] {
    const Memory::Place word = memory().Find(address, sizeof(uint32_t));
    if (!MayCopy(word, word, "in a write")) return;
    __atomic_store_n(reinterpret_cast<uint32_t*>(word.bytes), value, __ATOMIC_RELEASE);
  });
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return Enter("cuThreadExchangeStreamCaptureMode");
}

CUresult cuStreamBeginCapture_v2(CUstream stream, int) {
  if (const CUresult result = EnterInContext("cuStreamBeginCapture"); result != CUDA_SUCCESS)
    return result;
  static std::atomic<uint64_t> last{0};
  stream = Resolve(stream);
  const std::lock_guard lock(stream->mutex);
  if (stream->capture.has_value()) return CUDA_ERROR_INVALID_VALUE;
  stream->capture.emplace(CUstream_st::Capture{++last, std::this_thread::get_id(), {}});
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  if (const CUresult result = EnterInContext("cuStreamEndCapture"); result != CUDA_SUCCESS)
    return result;
  stream = Resolve(stream);
  const std::lock_guard lock(stream->mutex);
  if (!stream->capture.has_value()) return CUDA_ERROR_INVALID_VALUE;
  *graph = new CUgraph_st{std::move(stream->capture->operations)};
  stream->capture.reset();
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* status, uint64_t* id, CUgraph*,
                                   const CUgraphNode**, size_t*) {
  if (const CUresult result = EnterInContext("cuStreamGetCaptureInfo"); result != CUDA_SUCCESS) {
    return result;
  }
  stream = Resolve(stream);
  const std::lock_guard lock(stream->mutex);
  *status = stream->capture.has_value() ? 1 : 0;
  if (stream->capture.has_value()) *id = stream->capture->id;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->operations};
  return Enter("cuGraphInstantiateWithFlags");
}

CUresult cuGraphDestroy(CUgraph graph) {
  delete graph;
  return Enter("cuGraphDestroy");
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
  delete exec;
  return Enter("cuGraphExecDestroy");
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  if (const CUresult result = EnterInContext("cuGraphLaunch"); result != CUDA_SUCCESS)
    return result;
  for (const Operation& operation : exec->operations) Resolve(stream)->worker.Push(operation);
  return CUDA_SUCCESS;
}

void fake_cuda_reset() { observer().Reset(); }
int64_t fake_cuda_violations() { return observer().violations(); }
const char* fake_cuda_first_violation() { return observer().first_violation(); }
void fake_cuda_delay(uint64_t seed, int microseconds) { observer().Delay(seed, microseconds); }
void fake_cuda_fail(const char* function, int nth, CUresult error) {
  observer().Fail(function, nth, error);
}
void fake_cuda_wait_values(int supported) { observer().waits_for_values = supported != 0; }
void fake_cuda_break() { observer().broken = true; }
int64_t fake_cuda_host_allocations() { return memory().host_allocations(); }

}  // extern "C"
