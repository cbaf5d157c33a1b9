// Runs part of a test in a forked child of the test's process.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

namespace cpumoe {

// Whether all threads of this process but the calling one sleep.
inline bool OtherThreadsSleep() {
  const std::string self = std::to_string(gettid());
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == self) continue;
    std::string stat;
    std::getline(std::ifstream(task.path() / "stat"), stat);
    const size_t name_end = stat.rfind(") ");
    // The file of a thread that has just ended is empty.
    if (name_end != std::string::npos && stat[name_end + 2] != 'S') return false;
  }
  return true;
}

// Runs body() in a forked child and returns its result, 100 if it threw; -1 if the child hung or
// died. Forks when the other threads sleep, or after a second if one polls: a sanitizer's
// allocator, unlike the C library's, stays locked in a child that is forked while another thread
// allocates, as a thread that starts does.
template <class Body>
int ResultInChild(Body body) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (!OtherThreadsSleep() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    int result = 100;
    try {
      result = body();
    } catch (...) {
    }
    _exit(result);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

}  // namespace cpumoe
