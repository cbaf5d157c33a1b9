// The TileFormat of a weight format on an ISA.
#pragma once

#include "packing/pack.h"
#include "packing/tile_format.h"
#include "packing/unpack-inl.h"

namespace cpumoe {

template <StreamIsa Isa, WeightFormat F>
inline constexpr TileFormat kTileFormat = {
    .name = F::kName.data(),
    .shape = kTileShape<F>,
    .has_factor = kHasFactorOf<F>,
    .scale_type = TypeOfScale<typename F::Scale>(),
    .require_scales = [](const RawMatrix& source) { source.RequireScales<F>(); },
    .pack =
        [](const TileLayout& layout, const RawMatrix& source, int64_t tile, std::byte* packed) {
          return PackedLayout<F>(layout).PackTile(source, tile, packed);
        },
    .require_holds_scales =
        []([[maybe_unused]] const MutableRawMatrix& out, [[maybe_unused]] int64_t row,
           [[maybe_unused]] int64_t column, [[maybe_unused]] const ScaleGrid& stored) {
          if constexpr (HasScales<F>) RequireHoldsScales<F>(out, row, column, stored);
        },
    .unpack = &TileUnpacker<Isa, F>::Unpack,
    .finish_unpacking = &Isa::FinishStreams};

}  // namespace cpumoe
