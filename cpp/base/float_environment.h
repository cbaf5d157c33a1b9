// The floating-point environment of our arithmetic.
#pragma once

#include <cfenv>

namespace cpumoe {

// While an object of this class lives, the calling thread rounds to nearest, does not flush results
// to zero, and does not read denormals as zero. Threads inherit these modes from their creator, and
// hosts change them (torch's set_flush_denormal). Without this class, results would depend on which
// thread ran a task.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace cpumoe
