// Opens variant libraries.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch/cpu_features.h"
#include "variant/variant_api.h"

namespace cpumoe {

// A variant's library cannot be used, because it is missing, damaged or from another build. The
// message names the file and the remedy. Python sees cpumoe._core.VariantError, a RuntimeError.
class VariantError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Opens the library of variant `isa` at `path`, or throws VariantError. If the build id of the
// library differs from that of this binary, nothing else in the library is used.
const VariantApi* OpenVariant(const std::string& isa, const std::string& path);

// Returns the table of variant `isa`, which is opened on first use and kept for the life of the
// process. Throws std::invalid_argument if the variant is unknown, not built or needs features that
// this CPU lacks (RequireIsa). Throws VariantError if the variant's library cannot be used.
const VariantApi& LoadVariant(const std::string& isa, const std::string& origin);

// Returns the weight formats of a variant, each name once.
std::vector<FormatInfo> FormatsOf(const VariantApi& variant);

// Returns a variant's entry for layers in weight format `format` whose stored scales have the type
// `scales`. Throws std::invalid_argument if the format is unknown, with a list of the known ones,
// or has no such scales.
const FormatEntry& FindFormat(const VariantApi& variant, const std::string& format,
                              ScaleType scales = ScaleType::kOwn);

}  // namespace cpumoe
