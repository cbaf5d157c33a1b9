// Measures the best that the machine can do on the threads that experts run on.
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "base/check.h"
#include "bindings/bindings.h"
#include "dispatch/variant_loader.h"
#include "engine/runtime.h"

namespace py = pybind11;

namespace cpumoe {
namespace {

template <class Body>
double SecondsOf(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Memory to read and to copy. A thread first takes the chunks that it touched first, which on NUMA
// machines lie in its own node's memory. Then it takes chunks that other threads have not reached
// yet.
class MemoryBuffer {
 public:
  MemoryBuffer(Runtime& runtime, int64_t bytes) {
    Require(bytes > 0, "bytes: must be positive, got ", bytes);
    pairs_ = CeilDiv(bytes, 2 * kChunkBytes);
    buffer_ = AlignedBuffer(static_cast<size_t>(2 * pairs_ * kChunkBytes));
    runtime.Execute([&](Node& node) {
      ForPairs(node.pool(), [](std::byte* pair) { std::memset(pair, 0, 2 * kChunkBytes); });
    });
  }

  int64_t nbytes() const { return static_cast<int64_t>(buffer_.size()); }

  // Reads the buffer once and returns the seconds taken.
  double Read(Runtime& runtime, const std::string& isa, const std::string& origin) const {
    const VariantApi& variant = LoadVariant(isa, origin);
    return Time(runtime, [&](const std::byte* pair) {
      for (const std::byte* chunk : {pair, pair + kChunkBytes}) {
        variant.read(reinterpret_cast<const float*>(chunk), kChunkFloats);
      }
    });
  }

  // Copies one half of the buffer to the other, and returns the seconds taken.
  double Copy(Runtime& runtime, const std::string& isa, const std::string& origin) const {
    const VariantApi& variant = LoadVariant(isa, origin);
    return Time(runtime,
                [&](std::byte* pair) { variant.copy(pair + kChunkBytes, pair, kChunkBytes); });
  }

 private:
  static constexpr int64_t kChunkBytes = int64_t{1} << 20;
  static constexpr int64_t kChunkFloats = kChunkBytes / int64_t{sizeof(float)};
  static_assert(kChunkFloats % kReadGranule == 0 && kChunkBytes % kCopyGranule == 0);

  struct alignas(128) Share {
    std::atomic<int64_t> next{0};  // the first of this thread's pairs that no thread has taken
    int64_t end = 0;
  };

  template <class Body>
  double Time(Runtime& runtime, Body&& body) const {
    double seconds = 0;
    runtime.Execute([&](Node& node) { seconds = SecondsOf([&] { ForPairs(node.pool(), body); }); });
    return seconds;
  }

  // Calls body(address) for each pair of chunks.
  template <class Body>
  void ForPairs(ThreadPool& pool, Body&& body) const {
    const int threads = pool.num_threads();
    std::vector<Share> shares(threads);
    for (int t = 0; t < threads; ++t) {
      shares[t].next = pairs_ * t / threads;
      shares[t].end = pairs_ * (t + 1) / threads;
    }
    pool.For(threads, [&](int64_t /*task*/, int thread) {
      for (int i = 0; i < threads; ++i) {
        Share& share = shares[(thread + i) % threads];
        for (int64_t pair; (pair = share.next.fetch_add(1)) < share.end;) {
          body(buffer_.data() + pair * 2 * kChunkBytes);
        }
      }
    });
  }

  int64_t pairs_ = 0;
  AlignedBuffer buffer_;
};

// Runs `tasks` tasks of `rounds` rounds each, of the multiply-adds that a format's calls consist
// of. Returns the multiply-accumulates done and the seconds taken.
std::pair<int64_t, double> RunDots(Runtime& runtime, const std::string& isa,
                                   const std::string& origin, const std::string& format,
                                   Precision precision, int64_t tasks, int64_t rounds) {
  const FormatEntry& entry = FindFormat(LoadVariant(isa, origin), format);
  const PeakLoop loop = entry.peaks[static_cast<size_t>(precision)];
  std::atomic<int64_t> done{0};
  double seconds = 0;
  runtime.Execute([&](Node& node) {
    seconds = SecondsOf([&] {
      node.pool().For(tasks, [&](int64_t /*task*/, int /*thread*/) { done += loop(rounds); });
    });
  });
  return {done, seconds};
}

}  // namespace

void BindLimits(py::module_& m) {
  py::class_<MemoryBuffer>(m, "MemoryBuffer")
      .def(py::init<Runtime&, int64_t>(), py::arg("runtime"), py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &MemoryBuffer::nbytes)
      .def("read", &MemoryBuffer::Read, py::arg("runtime"), py::arg("isa"), py::arg("origin"),
           py::call_guard<py::gil_scoped_release>(),
           "Reads the buffer once on all threads and returns the seconds taken.")
      .def("copy", &MemoryBuffer::Copy, py::arg("runtime"), py::arg("isa"), py::arg("origin"),
           py::call_guard<py::gil_scoped_release>(),
           "Copies one half to the other on all threads and returns the seconds taken.");
  m.def("run_dots", &RunDots, py::arg("runtime"), py::arg("isa"), py::arg("origin"),
        py::arg("format"), py::arg("precision"), py::arg("tasks"), py::arg("rounds"),
        py::call_guard<py::gil_scoped_release>(),
        "Multiplies and adds in registers on all threads, as calls of a weight format do; returns "
        "the multiply-accumulates done and the seconds taken.");
}

}  // namespace cpumoe
