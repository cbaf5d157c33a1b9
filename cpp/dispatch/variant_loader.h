// Opens variant libraries.
#pragma once

#include <stdexcept>
#include <string>

#include "dispatch/cpu_features.h"
#include "variant/variant_api.h"

namespace cpumoe {

// A variant's library cannot be used: it is missing, damaged or of another build. Names the file
// and the remedy. Python sees cpumoe._core.VariantError, a RuntimeError.
class VariantError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Opens the library of variant `isa` at `path`; throws VariantError. Nothing in the library but its
// build id is used unless that is the id of this binary.
const VariantApi* OpenVariant(const std::string& isa, const std::string& path);

// The table of variant `isa`, opened on first use and kept for the life of the process. Throws
// std::invalid_argument if it is unknown, not built or needs features that this CPU lacks
// (RequireIsa), VariantError if its library cannot be used.
const VariantApi& LoadVariant(const std::string& isa, const std::string& origin);

// The entry of weight format `format` in a variant; throws std::invalid_argument that lists those
// known.
const FormatEntry& FindFormat(const VariantApi& variant, const std::string& format);

}  // namespace cpumoe
