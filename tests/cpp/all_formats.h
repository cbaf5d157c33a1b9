// The weight formats of cmake/Variants.cmake, as a list of types and by the names of their rows.
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
#define CPUMOE_FORMAT_ROW(name, Class) std::string(#name),
  return {
#include "format_table.inc"
  };
#undef CPUMOE_FORMAT_ROW
}

// The row of a format.
template <class F>
std::string RowOf() {
#define CPUMOE_FORMAT_ROW(name, Class) \
  if (std::is_same_v<F, Class>) return #name;
#include "format_table.inc"
#undef CPUMOE_FORMAT_ROW
  throw std::invalid_argument("the format has no row");
}

// Calls body(Format{}) for the format of row `name`.
template <class Body>
auto VisitFormat(const std::string& name, Body&& body) {
#define CPUMOE_FORMAT_ROW(row, Class) \
  if (name == #row) return body(Class{});
#include "format_table.inc"
#undef CPUMOE_FORMAT_ROW
  throw std::invalid_argument("there is no row " + name);
}

}  // namespace cpumoe
