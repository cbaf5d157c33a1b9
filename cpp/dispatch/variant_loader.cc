#include "dispatch/variant_loader.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>

#include "base/check.h"
#include "variant/build_id.h"

namespace cpumoe {
namespace {

// The folder of the binary that this code is linked into, which is the Python package or a build
// folder.
std::string OwnFolder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&LoadVariant), &info) == 0 ||
      info.dli_fname == nullptr) {
    throw std::runtime_error("cannot find the folder of cpumoe's libraries");
  }
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

struct CloseLibrary {
  void operator()(void* library) const { dlclose(library); }
};

void RequireThisBuild(void* library, const std::string& path) {
  const auto* text = static_cast<const char*>(dlsym(library, kBuildIdSymbol));
  const std::string found = text == nullptr ? "" : std::string(text, strnlen(text, kBuildIdBytes));
  if (found == kBuildId) return;
  throw VariantError(Message(path, " has ", text == nullptr ? "no build id" : "build id ", found,
                             ", expected ", kBuildId,
                             ": it is from another build of cpumoe; reinstall cpumoe"));
}

}  // namespace

const VariantApi* OpenVariant(const std::string& isa, const std::string& path) {
  std::unique_ptr<void, CloseLibrary> library(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (library == nullptr) {
    throw VariantError(Message("cannot open variant ", isa, ": ", dlerror(), "; reinstall cpumoe"));
  }
  RequireThisBuild(library.get(), path);
  auto api = reinterpret_cast<VariantApiFunction>(dlsym(library.get(), kVariantApiSymbol));
  if (api == nullptr || api()->isa != isa) {
    throw VariantError(
        Message(path, " is not cpumoe's library for variant ", isa, "; reinstall cpumoe"));
  }
  library.release();  // stays open for the life of the process
  return api();
}

const VariantApi& LoadVariant(const std::string& isa, const std::string& origin) {
  RequireIsa(isa, DetectFeatures(), origin);
  static std::mutex mutex;
  static std::map<std::string, const VariantApi*> opened;
  const std::lock_guard lock(mutex);
  const VariantApi*& api = opened[isa];
  if (api == nullptr) api = OpenVariant(isa, OwnFolder() + "/cpumoe_" + isa + ".so");
  return *api;
}

std::vector<FormatInfo> FormatsOf(const VariantApi& variant) {
  std::vector<FormatInfo> formats;
  for (const FormatEntry& entry : std::span(variant.formats, variant.num_formats)) {
    const std::string_view name = entry.info.name;
    const bool is_new = std::ranges::none_of(
        formats, [name](const FormatInfo& known) { return name == known.name; });
    if (is_new) formats.push_back(entry.info);
  }
  return formats;
}

const FormatEntry& FindFormat(const VariantApi& variant, const std::string& format,
                              ScaleType scales) {
  bool is_known = false;
  for (const FormatEntry& entry : std::span(variant.formats, variant.num_formats)) {
    if (format != entry.info.name) continue;
    if (entry.info.TakesScales(scales)) return entry;
    is_known = true;
  }
  Require(!is_known, format, " has no ", ScaleTypeName(scales), " scales");
  std::string known;
  for (const FormatInfo& info : FormatsOf(variant)) {
    known += (known.empty() ? "" : ", ") + std::string(info.name);
  }
  throw std::invalid_argument(Message("unknown weight format \"", format, "\"; known are ", known));
}

}  // namespace cpumoe
