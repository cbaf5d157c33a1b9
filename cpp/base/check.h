// Errors that reach the user as Python exceptions. A message names its subject, what was required,
// what was passed, and the remedy.
//
// std::invalid_argument becomes ValueError, std::out_of_range IndexError, std::runtime_error
// RuntimeError.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace cpumoe {

// A part of a message: text or a number.
class MessagePart {
 public:
  MessagePart(std::string_view text) : text_(text) {}    // NOLINT(google-explicit-constructor)
  MessagePart(const std::string& text) : text_(text) {}  // NOLINT(google-explicit-constructor)
  MessagePart(const char* text) : text_(text) {}         // NOLINT(google-explicit-constructor)
  template <class Number>
    requires std::is_arithmetic_v<Number>
  MessagePart(Number number) {  // NOLINT(google-explicit-constructor)
    if constexpr (std::is_floating_point_v<Number>) {
      length_ = std::snprintf(digits_, sizeof(digits_), "%g", static_cast<double>(number));
    } else {
      length_ = static_cast<int>(std::to_chars(digits_, std::end(digits_), +number).ptr - digits_);
    }
  }

  std::string_view text() const {
    return length_ == 0 ? text_ : std::string_view(digits_, length_);
  }

 private:
  std::string_view text_;
  char digits_[24];
  int length_ = 0;  // of digits_; 0: the part is text
};

// Joins the parts of a message. Not a template, because errors are much code and run once.
__attribute__((noinline)) inline std::string Join(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) message += part.text();
  return message;
}

template <class... Parts>
std::string Message(const Parts&... parts) {
  return Join({parts...});
}

// Throws std::invalid_argument unless `condition` holds. The message is `parts`, joined.
template <class... Parts>
void Require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(Message(parts...));
}

// The functions below check one argument and throw std::invalid_argument. `name` is the argument's
// name, in parts that the message joins.
template <class... Name>
void RequireAddress(const void* address, const Name&... name) {
  Require(address != nullptr, name..., ": expected an address, got a null pointer");
}
template <class... Name>
void RequireCount(int64_t count, const Name&... name) {
  Require(count >= 0, name..., ": expected 0 or more, got ", count);
}
// Requires that `rows` rows, `stride` elements of `element_bytes` apart, fit an address space. The
// distance of any two rows is then a number of bytes that does not overflow. `rows` and
// `element_bytes` are positive.
template <class... Name>
void RequireStride(int64_t stride, int64_t rows, int64_t element_bytes, const Name&... name) {
  constexpr int64_t kAddressSpace = int64_t{1} << 60;
  int64_t row = 0, all = 0;
  if (!__builtin_mul_overflow(stride, element_bytes, &row) &&
      !__builtin_mul_overflow(row, rows, &all) && all >= 0 && all <= kAddressSpace) {
    return;
  }
  throw std::invalid_argument(Message(name..., ": expected 0 to ",
                                      kAddressSpace / element_bytes / rows, " for ", rows,
                                      " rows, got ", stride));
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
