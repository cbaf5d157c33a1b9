// The build that a binary comes from. A variant library is called only if it comes from the build
// of the code that opens it, because both share C++ types (variant_api.h).
//
// Every variant library exports `cpumoe_build_id`: 64 bytes of ASCII text, padded with at least one
// zero byte. This layout never changes, so that the id of a library of any version can be read
// before anything else in the library is used. cmake/BuildId.cmake says what the id is made of.
#pragma once

#include <cstddef>

namespace cpumoe {

inline constexpr size_t kBuildIdBytes = 64;
inline constexpr char kBuildIdSymbol[] = "cpumoe_build_id";

extern const char* const kVersion;  // the version of the package, as in pyproject.toml
extern const char* const kBuildId;  // the id of the binary that contains this code

}  // namespace cpumoe

extern "C" __attribute__((visibility("default"))) const char cpumoe_build_id[cpumoe::kBuildIdBytes];
