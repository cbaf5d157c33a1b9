// Runs part of a test in a forked child of the test's process.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

namespace cpumoe {

// Runs body() in a forked child and returns its result, 100 if it threw; -1 if the child hung or
// died.
template <class Body>
int ResultInChild(Body body) {
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
