// The weight formats of cmake/Variants.cmake, as a list of types and by name.
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "base/float_types.h"
#include "format_headers.inc"

namespace cpumoe {

template <class /*before the first comma*/, class... Formats>
using FormatList = testing::Types<Formats...>;

#define CPUMOE_FORMAT_ROW(name, Class) , Class
using AllFormats = FormatList<void
#include "format_table.inc"
                              >;
#undef CPUMOE_FORMAT_ROW

// Those that have scales.
template <class... Formats>
auto WithScales(testing::Types<Formats...>) {
  using Tuple = decltype(std::tuple_cat(
      std::conditional_t<HasScales<Formats>, std::tuple<Formats>, std::tuple<>>{}...));
  return []<class... Scaled>(std::tuple<Scaled...>*) {
    return testing::Types<Scaled...>{};
  }(static_cast<Tuple*>(nullptr));
}
using ScaledFormats = decltype(WithScales(AllFormats{}));

inline std::vector<std::string> FormatNames() {
#define CPUMOE_FORMAT_ROW(name, Class) std::string(Class::kName),
  return {
#include "format_table.inc"
  };
#undef CPUMOE_FORMAT_ROW
}

// Calls body(Format{}) for the format called `name`.
template <class Body>
auto VisitFormat(const std::string& name, Body&& body) {
#define CPUMOE_FORMAT_ROW(row, Class) \
  if (name == Class::kName) return body(Class{});
#include "format_table.inc"
#undef CPUMOE_FORMAT_ROW
  throw std::invalid_argument("no format is called " + name);
}

}  // namespace cpumoe
