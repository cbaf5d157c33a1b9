// Errors that reach the user as Python exceptions: subject, what was required, what was got,
// remedy.
//
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::runtime_error
// RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

}  // namespace cpumoe
