#include "engine/runtime.h"

#include <exception>
#include <stdexcept>
#include <utility>

#include "dispatch/cpu_features.h"

namespace cpumoe {

namespace {

std::vector<MemoryNode> MemoryNodes(const std::vector<NodeThreads>& nodes) {
  std::vector<MemoryNode> memory;
  for (const NodeThreads& node : nodes) memory.push_back(node.memory);
  return memory;
}

}  // namespace

Runtime::Runtime(const Options& options)
    : callers_compute_(options.callers_compute),
      nodes_(MemoryNodes(options.node.nodes)),
      node_(std::make_unique<Node>(options.node)) {}

std::shared_ptr<Runtime> Runtime::Create(const Options& options) {
  DetectFeatures();  // must run before threads exist
  return std::shared_ptr<Runtime>(new Runtime(options));
}

Runtime::~Runtime() {
  if (fork_guard_.forked()) static_cast<void>(node_.release());
}

void Runtime::Close() {
  // A forked child has no threads, and perhaps not the thread that owns a mutex.
  if (fork_guard_.forked()) return;
  // A second thread that closes returns no sooner than the first. Without this mutex it would end
  // the pool before the queued calls have run.
  const std::lock_guard closing(close_mutex_);
  std::unique_ptr<Executor> driver;
  {
    const std::lock_guard lock(submit_mutex_);
    if (node_ == nullptr) return;
    driver = node_->RetireDriver();
  }
  driver.reset();  // runs the queued calls
  const std::scoped_lock lock(run_mutex_, submit_mutex_);
  node_.reset();
}

std::shared_ptr<Completion> Runtime::Submit(Body body) {
  fork_guard_.ThrowIfForked(kSubject);
  const std::lock_guard lock(submit_mutex_);
  return Driver().Submit(
      [self = shared_from_this(), body = std::move(body)]() mutable { self->Run(body); });
}

std::shared_ptr<Completion> Runtime::SubmitSteps(Step step) {
  fork_guard_.ThrowIfForked(kSubject);
  const std::lock_guard lock(submit_mutex_);
  return Driver().SubmitSteps(
      [self = shared_from_this(), step = std::move(step)]() mutable { return self->Run(step); });
}

void Runtime::ExecuteSteps(const Step& step) {
  bool more = true;
  while (more) Execute([&](Node& node) { more = step(node); });
}

Executor& Runtime::Driver() {
  RequireOpen(node_ != nullptr && node_->driver() != nullptr);
  return *node_->driver();
}

void Runtime::ExecuteOnDriver(const Body& body) {
  {
    // Refused before it is queued, because the queued body would outlive what it refers to.
    const std::lock_guard lock(submit_mutex_);
    if (Driver().IsDriver()) {
      throw std::logic_error("Runtime: what runs on a runtime must not make calls on it");
    }
  }
  // The exception is the caller's alone. If it were the completion's, too, the driver could be the
  // one that destroys it. That is allowed, but ThreadSanitizer does not see why.
  std::exception_ptr error;
  Submit([&](Node& node) {
    try {
      body(node);
    } catch (...) {
      error = std::current_exception();
    }
  })->Wait();
  if (error != nullptr) std::rethrow_exception(error);
}

void Runtime::RequireOpen(bool open) {
  if (!open) throw std::runtime_error("this Runtime is closed; create a new one");
}

}  // namespace cpumoe
