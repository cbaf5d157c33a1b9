// Opens variant libraries.
#pragma once

#include <string>

#include "dispatch/cpu_features.h"
#include "variant/variant_api.h"

namespace cpumoe {

// The table of variant `isa`, opened on first use and kept for the life of the process. Throws
// std::invalid_argument if it is unknown, not built or needs features that this CPU lacks
// (RequireIsa), std::runtime_error if its library is missing or damaged.
const VariantApi& LoadVariant(const std::string& isa, const std::string& origin);

// The entry of weight format `format` in a variant; throws std::invalid_argument that lists those
// known.
const FormatEntry& FindFormat(const VariantApi& variant, const std::string& format);

}  // namespace cpumoe
