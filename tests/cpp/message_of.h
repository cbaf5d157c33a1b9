// The message of the exception that a piece of code throws.
#pragma once

#include <string>

namespace cpumoe {

template <class Exception, class Body>
std::string MessageOf(Body&& body) {
  try {
    body();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no exception";
}

}  // namespace cpumoe
