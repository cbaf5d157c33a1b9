// The floating-point environment of our arithmetic.
#pragma once

#include <cfenv>

namespace cpumoe {

// While it lives, the calling thread rounds to nearest and neither flushes results to zero nor
// reads denormals as zero. Threads inherit these modes from whoever starts them and hosts switch
// them (torch's set_flush_denormal): results would depend on which thread ran a task.
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
