#include "engine/placement.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <sstream>
#include <system_error>

namespace cpumoe {
namespace {

template <class Number>
bool Parse(std::string_view text, Number& number, int base = 10) {
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number, base);
  return error == std::errc() && stop == end;
}

// The nodes of some pages of a share. A negative number is an error of that page. Empty: refused.
std::vector<int> NodesOfPages(const MemoryShare& share) {
  constexpr size_t kMostPages = 4096;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = share.bytes / page;
  const size_t step = std::max<size_t>((pages + kMostPages - 1) / kMostPages, 1);
  std::vector<const std::byte*> addresses;
  for (size_t i = 0; i < pages; i += step) addresses.push_back(share.data + i * page);
  std::vector<int> nodes(addresses.size());
  // Without nodes to move to, the system call only says where pages are.
  const long result =
      syscall(SYS_move_pages, 0, addresses.size(), addresses.data(), nullptr, nodes.data(), 0);
  return result == 0 ? nodes : std::vector<int>();
}

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

std::map<int, int64_t> PagesOfMapping(std::string_view numa_maps, uintptr_t address) {
  // A line is "7f0c8a000000 prefer:1 anon=512 dirty=512 N0=2 N1=510 kernelpagesize_kB=4". Lines
  // have no ends, so the mapping is the last one that begins before the address.
  std::istringstream lines{std::string(numa_maps)};
  std::map<int, int64_t> pages;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string word;
    uintptr_t begin = 0;
    if (!(words >> word) || !Parse(word, begin, 16)) continue;
    if (begin > address) break;
    pages.clear();
    while (words >> word) {
      const size_t equals = word.find('=');
      int node = 0;
      int64_t count = 0;
      if (word[0] != 'N' || equals == std::string::npos) continue;
      const std::string_view text = word;
      if (!Parse(text.substr(1, equals - 1), node) || !Parse(text.substr(equals + 1), count)) {
        continue;
      }
      pages[node] = count;
    }
  }
  return pages;
}

std::vector<Placement> PlacementOf(const std::vector<MemoryShare>& shares,
                                   const std::string& proc) {
  std::vector<Placement> placement;
  std::string maps;
  for (const MemoryShare& share : shares) {
    Placement& its = placement.emplace_back();
    its.share = share;
    if (share.data == nullptr) continue;
    const std::vector<int> nodes = NodesOfPages(share);
    for (const int node : nodes) {
      if (node < 0) continue;
      ++its.pages;
      its.local += node == share.node ? 1 : 0;
    }
    if (!nodes.empty()) continue;
    if (maps.empty()) maps = ReadAll(proc + "/self/numa_maps");
    for (const auto& [node, pages] :
         PagesOfMapping(maps, reinterpret_cast<uintptr_t>(share.data))) {
      its.pages += pages;
      its.local += node == share.node ? pages : 0;
    }
  }
  return placement;
}

}  // namespace cpumoe
