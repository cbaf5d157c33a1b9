// The panel kernels for multiplicands that include their scales: C += A * panel.
//
//   A      [pairs][tokens][2] of Isa::Activation
//   panel  [pairs][Isa::kTiles] of Isa::Pair
//   C      [Isa::kTiles][tokens][16] fp32
//
// The kernels depend on the ISA alone. Therefore a variant library instantiates them once
// (panel_kernels-inl.h), and the kernels of all formats are declared with this header.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/isa.h"
#include "kernels/token_blocks.h"

namespace cpumoe {

template <class Isa>
struct PanelKernels {
  // If a kernel fetches, it also fetches into L2 the data `to_next` bytes after each pair of
  // activations.
  using Kernel = void (*)(const typename Isa::Pair* panel, const typename Isa::Activation* a,
                          int64_t pairs, int64_t to_next, float* c);
  // By number of tokens. The kernel for n tokens is entry [n - 1].
  using Table = std::array<Kernel, Isa::kPanelTokens>;

  static const Table kPlain;
  static const Table kFetching;

  // Whether the table's kernel fetches. A block that is smaller than each of several is the only
  // one, and its activations stay in L2.
  static constexpr bool FetchesFor(bool fetching_table, int tokens) {
    return fetching_table && tokens >= TokenBlocks::FewestOfSeveral(Isa::kPanelTokens);
  }
};

// A panel unit multiplies instead.
template <HasPanelUnit Isa>
struct PanelKernels<Isa> {};

template <>
struct PanelKernels<NoWideIsa> {};

}  // namespace cpumoe
