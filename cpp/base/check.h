// Errors that reach the user as Python exceptions: subject, what was required, what was got,
// remedy.
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

// Throws std::invalid_argument made of `parts` unless `condition` holds.
template <class... Parts>
void Require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(Message(parts...));
}

// std::bad_alloc (MemoryError in Python) that says what was wanted.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace cpumoe
