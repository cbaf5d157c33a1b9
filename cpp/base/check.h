// Errors that reach the user as Python exceptions. A message names its subject, what was required,
// what was passed, and the remedy.
//
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::runtime_error
// RuntimeError.
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace cpumoe {

template <class... Parts>
std::string Message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws std::invalid_argument unless `condition` holds. The message is `parts`, joined.
template <class... Parts>
void Require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(Message(parts...));
}

// A std::bad_alloc (MemoryError in Python) with a message that says how much memory was wanted for
// what.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace cpumoe
