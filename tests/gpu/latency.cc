// Measures how long a stream takes to hand work to the CPU and to wait for it, by mechanism.
//
//   submit                                  wait
//   host function                           host function
//   host function                           wait for a value
//   mailbox: the stream writes a value      wait for a value
//   that a thread of the CPU polls
//
// Each mechanism runs a pass of 43 layers, whose operations are queued one by one or belong to a
// graph. The work is none, and the thread that does it polls, so that only the mechanism takes
// time. Other rows add the copies of a call of one token: inputs to the CPU, output to the GPU.
//
//   latency [LAYERS PASSES]
//
// Prints a line for each row (results.py). Compiled without CUDA's headers; the driver library is
// found by its name when the program runs.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/cuda_api.h"

namespace {

using Clock = std::chrono::steady_clock;
using Word = std::atomic<uint32_t>;

constexpr unsigned kPortable = 1, kDeviceMap = 2, kWaitEqual = 1;
constexpr size_t kHiddenBytes = 8192, kRoutingBytes = 32;  // of a token
constexpr unsigned kSecondsOfARow = 8;

int layers = 43, passes = 50;

// Names are those of the library, which end in the version of their binary interface.
// clang-format off
#define CUDA_FUNCTIONS(F)                                                      \
  F(cuInit) F(cuDeviceGet) F(cuDevicePrimaryCtxRetain) F(cuCtxSetCurrent)      \
  F(cuMemAlloc_v2) F(cuMemHostAlloc) F(cuMemcpyAsync)                          \
  F(cuStreamCreate) F(cuStreamSynchronize) F(cuLaunchHostFunc)                 \
  F(cuStreamWaitValue32_v2) F(cuStreamWriteValue32_v2)                         \
  F(cuStreamBeginCapture_v2) F(cuStreamEndCapture)                             \
  F(cuGraphInstantiateWithFlags) F(cuGraphLaunch)
// clang-format on

struct Driver {
#define DECLARE(name) decltype(&::name) name = nullptr;
  CUDA_FUNCTIONS(DECLARE)
#undef DECLARE

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(dlerror());
#define FIND(name) name = reinterpret_cast<decltype(name)>(dlsym(library, #name));
    CUDA_FUNCTIONS(FIND)
#undef FIND
  }
};

// Calls a function of the driver.
#define CUDA(name, ...) Check(#name, driver.name, __VA_ARGS__)
template <class Function, class... Args>
void Check(const char* name, Function* function, Args... args) {
  if (function == nullptr) throw std::runtime_error(std::string("the driver has no ") + name);
  const CUresult result = function(args...);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + " failed with " + std::to_string(result));
  }
}

CUdeviceptr Address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

enum class Submit { kNothing, kHostFunction, kMailbox };
enum class Wait { kNothing, kHostFunction, kValue };

struct Row {
  const char* name;
  Submit submit;
  Wait wait;
  bool copies;
};
constexpr Row kRows[] = {
    {"host function + host function", Submit::kHostFunction, Wait::kHostFunction, false},
    {"host function + wait for a value", Submit::kHostFunction, Wait::kValue, false},
    {"mailbox + wait for a value", Submit::kMailbox, Wait::kValue, false},
    {"copies alone", Submit::kNothing, Wait::kNothing, true},
    {"host function + host function, with copies", Submit::kHostFunction, Wait::kHostFunction,
     true},
    {"host function + wait for a value, with copies", Submit::kHostFunction, Wait::kValue, true},
    {"mailbox + wait for a value, with copies", Submit::kMailbox, Wait::kValue, true},
};

// Words of page-locked memory, on cache lines of their own.
struct alignas(64) Mail {
  alignas(64) Word wanted;  // 1: the CPU shall work
  alignas(64) Word done;    // 1: it has
};

class Streams {
 public:
  explicit Streams(const Row& row) : row_(row) {
    CUDA(cuInit, 0U);
    CUdevice device = 0;
    CUDA(cuDeviceGet, &device, 0);
    CUcontext context = nullptr;
    CUDA(cuDevicePrimaryCtxRetain, &context, device);
    CUDA(cuCtxSetCurrent, context);
    CUDA(cuStreamCreate, &stream_, CU_STREAM_NON_BLOCKING);
    void* memory = nullptr;
    CUDA(cuMemHostAlloc, &memory, sizeof(Mail), kPortable | kDeviceMap);
    mail_ = new (memory) Mail{};
    CUDA(cuMemHostAlloc, &host_, 2 * kHiddenBytes, kPortable | kDeviceMap);
    CUDA(cuMemAlloc_v2, &device_, 2 * kHiddenBytes);
    worker_ = std::thread([this] { Work(); });
  }
  ~Streams() {
    stop_ = true;
    worker_.join();
  }

  // Returns the median microseconds per layer of passes that are queued one operation at a time,
  // and how many of these the queueing thread needs.
  std::pair<double, double> Eager() {
    std::vector<double> all, queueing;
    for (int i = 0; i < passes; ++i) {
      const auto start = Clock::now();
      QueuePass();
      queueing.push_back(PerLayer(start));
      CUDA(cuStreamSynchronize, stream_);
      all.push_back(PerLayer(start));
    }
    return {Median(all), Median(queueing)};
  }

  // Returns the median microseconds per layer of a graph's replays.
  double Graph() {
    CUgraph graph = nullptr;
    CUgraphExec exec = nullptr;
    CUDA(cuStreamBeginCapture_v2, stream_, CU_STREAM_CAPTURE_MODE_GLOBAL);
    QueuePass();
    CUDA(cuStreamEndCapture, stream_, &graph);
    CUDA(cuGraphInstantiateWithFlags, &exec, graph, 0ULL);
    std::vector<double> all;
    for (int i = 0; i < passes; ++i) {
      const auto start = Clock::now();
      CUDA(cuGraphLaunch, exec, stream_);
      CUDA(cuStreamSynchronize, stream_);
      all.push_back(PerLayer(start));
    }
    return Median(all);
  }

  int64_t worked() const { return worked_; }

 private:
  static double PerLayer(Clock::time_point start) {
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count() / layers;
  }
  static double Median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
  }

  // The thread that does the work.
  void Work() {
    while (!stop_) {
      if (mail_->wanted.load(std::memory_order_acquire) == 0) continue;
      mail_->wanted.store(0, std::memory_order_relaxed);
      ++worked_;
      mail_->done.store(1, std::memory_order_release);
    }
  }

  void QueuePass() {
    for (int i = 0; i < layers; ++i) QueueLayer();
  }

  void QueueLayer() {
    const CUdeviceptr host = Address(host_);
    if (row_.copies) {
      CUDA(cuMemcpyAsync, host, device_, kHiddenBytes, stream_);
      CUDA(cuMemcpyAsync, host, device_, kRoutingBytes, stream_);
      CUDA(cuMemcpyAsync, host, device_, kRoutingBytes, stream_);
    }
    if (row_.submit == Submit::kHostFunction) {
      CUDA(cuLaunchHostFunc, stream_, &Start, static_cast<void*>(mail_));
    } else if (row_.submit == Submit::kMailbox) {
      CUDA(cuStreamWriteValue32_v2, stream_, Address(&mail_->done), 0U, 0U);
      CUDA(cuStreamWriteValue32_v2, stream_, Address(&mail_->wanted), 1U, 0U);
    }
    if (row_.wait == Wait::kHostFunction) {
      CUDA(cuLaunchHostFunc, stream_, &Await, static_cast<void*>(mail_));
    } else if (row_.wait == Wait::kValue) {
      CUDA(cuStreamWaitValue32_v2, stream_, Address(&mail_->done), 1U, kWaitEqual);
    }
    if (row_.copies) {
      CUDA(cuMemcpyAsync, device_ + kHiddenBytes, host + kHiddenBytes, kHiddenBytes, stream_);
    }
  }

  static void Start(void* mail) {
    static_cast<Mail*>(mail)->done.store(0, std::memory_order_relaxed);
    static_cast<Mail*>(mail)->wanted.store(1, std::memory_order_release);
  }
  static void Await(void* mail) {
    while (static_cast<Mail*>(mail)->done.load(std::memory_order_acquire) == 0) {
    }
  }

  const Driver driver;
  const Row row_;
  CUstream stream_ = nullptr;
  Mail* mail_ = nullptr;
  void* host_ = nullptr;
  CUdeviceptr device_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> worked_{0};
  std::thread worker_;
};

// Escapes what an exception's text may have.
std::string Quoted(const std::string& text) {
  std::string quoted;
  for (const char c : text) quoted += c == '"' || c == '\\' || c < ' ' ? '\'' : c;
  return '"' + quoted + '"';
}

void Report(const Row& row, const char* status, const std::string& reason,
            const std::string& numbers = "") {
  std::printf("@@result {\"status\": \"%s\", \"name\": %s, \"reason\": %s, \"numbers\": {%s}}\n",
              status, Quoted(row.name).c_str(), Quoted(reason).c_str(), numbers.c_str());
  std::fflush(stdout);
}

// Measures a row in this process, and ends the process.
[[noreturn]] void Measure(const Row& row) {
  alarm(kSecondsOfARow);
  try {
    Streams streams(row);
    streams.Eager();  // warms up
    const auto [eager, queueing] = streams.Eager();
    const double graph = streams.Graph();
    char numbers[200];
    std::snprintf(numbers, sizeof(numbers),
                  R"("eager_us": %.2f, "queueing_us": %.2f, "graph_us": %.2f)", eager, queueing,
                  graph);
    const int64_t expected = row.submit == Submit::kNothing ? 0 : int64_t{3} * passes * layers;
    const bool complete = streams.worked() == expected;
    Report(row, complete ? "PASS" : "FAIL", complete ? "" : "some work was not done", numbers);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const bool missing = text.find("the driver has no") != std::string::npos ||
                         text.ends_with(" " + std::to_string(CUDA_ERROR_NOT_SUPPORTED));
    Report(row, missing ? "SKIPPED" : "FAIL", text);
  }
  std::_Exit(0);
}

int NumberOf(const char* text) {
  return static_cast<int>(std::clamp(std::strtol(text, nullptr, 10), 1L, 1000L));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    layers = NumberOf(argv[1]);
    passes = NumberOf(argv[2]);
  } else if (argc != 1) {
    std::fputs("usage: latency [LAYERS PASSES]\n", stderr);
    return 2;
  }
  // A row that hangs or crashes takes no other row along.
  for (const Row& row : kRows) {
    const pid_t child = fork();
    if (child == 0) Measure(row);
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
      Report(row, "FAIL", "no process for it");
    } else if (WIFSIGNALED(status)) {
      Report(row, "FAIL",
             WTERMSIG(status) == SIGALRM
                 ? "not finished after " + std::to_string(kSecondsOfARow) + " s"
                 : "ended by signal " + std::to_string(WTERMSIG(status)));
    }
  }
  return 0;
}
