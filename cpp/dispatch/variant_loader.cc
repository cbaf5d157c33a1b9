#include "dispatch/variant_loader.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>

#include "base/check.h"

namespace cpumoe {
namespace {

// The folder of the binary that this code is linked into: the Python package, or a build folder.
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

const VariantApi* Open(const std::string& isa) {
  const std::string path = OwnFolder() + "/cpumoe_" + isa + ".so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error(
        Message("cannot open variant ", isa, ": ", dlerror(), "; reinstall cpumoe"));
  }
  auto api = reinterpret_cast<VariantApiFunction>(dlsym(library, kVariantApiSymbol));
  if (api == nullptr || api()->isa != isa) {
    throw std::runtime_error(
        Message(path, " is not cpumoe's library for variant ", isa, "; reinstall cpumoe"));
  }
  return api();
}

}  // namespace

const VariantApi& LoadVariant(const std::string& isa, const std::string& origin) {
  RequireIsa(isa, DetectFeatures(), origin);
  static std::mutex mutex;
  static std::map<std::string, const VariantApi*> opened;
  const std::lock_guard lock(mutex);
  const VariantApi*& api = opened[isa];
  if (api == nullptr) api = Open(isa);
  return *api;
}

const FormatEntry& FindFormat(const VariantApi& variant, const std::string& format) {
  std::string known;
  for (size_t i = 0; i < variant.num_formats; ++i) {
    const FormatEntry& entry = variant.formats[i];
    if (format == entry.info.name) return entry;
    known += (known.empty() ? "" : ", ") + std::string(entry.info.name);
  }
  throw std::invalid_argument(Message("unknown weight format \"", format, "\"; known are ", known));
}

}  // namespace cpumoe
