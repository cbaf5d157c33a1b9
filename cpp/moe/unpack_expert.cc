#include "moe/unpack_expert.h"

#include <algorithm>

#include "base/check.h"

namespace cpumoe {

// How many bytes a task reads, about: enough to make handing it out negligible, and so few that
// many threads share an expert.
static constexpr int64_t kTaskBytes = int64_t{64} << 10;

ExpertUnpacker::ExpertUnpacker(const PackedExperts& weights, std::span<const ExpertDestination> out)
    : weights_(weights), out_(out) {
  for (const ExpertDestination& each : out_) {
    RequireFits(each);
    tasks_ += SplitOf(each).tasks();
  }
}

void ExpertUnpacker::Run(int64_t expert, int64_t begin, int64_t end, ThreadPool& pool) const {
  const int64_t copy = weights_.config().CopyOf(expert);
  RequireScales(copy);
  pool.For(end - begin, [&](int64_t task, int /*thread*/) {
    task += begin;
    for (const ExpertDestination& each : out_) {
      const Split split = SplitOf(each);
      if (task < split.tasks()) {
        RunTask(copy, each, split, task);
        break;
      }
      task -= split.tasks();
    }
    weights_.format().finish_unpacking();
  });
}

ExpertUnpacker::Split ExpertUnpacker::SplitOf(const ExpertDestination& out) const {
  const TileLayout& gate_up = weights_.layout(Projection::kGate);
  const TileLayout& down = weights_.layout(Projection::kDown);
  const int64_t begin = out.intermediate_begin, features = out.up.rows;
  const int64_t first = begin / kTileRows;
  const int64_t down_bytes = down.TileBytes() * features / weights_.config().intermediate_size;
  return {.first_pair = first,
          .pairs = features == 0 ? 0 : CeilDiv(begin + features, kTileRows) - first,
          .pairs_per_task = std::max<int64_t>(kTaskBytes / (2 * gate_up.TileBytes()), 1),
          .downs = features == 0 ? 0 : down.tiles(),
          .downs_per_task = std::max<int64_t>(kTaskBytes / std::max<int64_t>(down_bytes, 1), 1)};
}

void ExpertUnpacker::RunTask(int64_t copy, const ExpertDestination& out, const Split& split,
                             int64_t task) const {
  if (task < split.pair_tasks()) {
    const int64_t end = std::min((task + 1) * split.pairs_per_task, split.pairs);
    for (int64_t pair = task * split.pairs_per_task; pair < end; ++pair) {
      const int64_t tile = split.first_pair + pair;
      if (gated()) UnpackTile(copy, Projection::kGate, tile, out.intermediate_begin, 0, out.gate);
      UnpackTile(copy, Projection::kUp, tile, out.intermediate_begin, 0, out.up);
    }
    return;
  }
  task -= split.pair_tasks();
  const int64_t end = std::min((task + 1) * split.downs_per_task, split.downs);
  for (int64_t tile = task * split.downs_per_task; tile < end; ++tile) {
    UnpackTile(copy, Projection::kDown, tile, 0, out.intermediate_begin, out.down);
  }
}

void ExpertUnpacker::UnpackTile(int64_t copy, Projection p, int64_t tile, int64_t row,
                                int64_t column, const MutableRawMatrix& out) const {
  weights_.format().unpack(weights_.Tile(copy, p, tile), tile, weights_.layout(p).rows(), row,
                           column, out);
}

void ExpertUnpacker::RequireFits(const ExpertDestination& out) const {
  const MoeConfig& config = weights_.config();
  const int64_t begin = out.intermediate_begin, count = out.up.rows;
  Require(begin >= 0 && count >= 0 && begin + count <= config.intermediate_size &&
              begin % kGroupSize == 0 &&
              (count % kGroupSize == 0 || begin + count == config.intermediate_size),
          weights_.format().name, ": intermediate features to export must be whole groups of ",
          kGroupSize, " within [0, ", config.intermediate_size, "), got [", begin, ", ",
          begin + count, ")");
  if (gated()) out.gate.RequireShape(count, config.hidden_size);
  out.up.RequireShape(count, config.hidden_size);
  out.down.RequireShape(config.hidden_size, count);
}

// Each destination must have a scale wherever the stored matrix begins another one, of a type that
// holds it.
void ExpertUnpacker::RequireScales(int64_t copy) const {
  const TileFormat& format = weights_.format();
  const auto& [gate, up, down] = weights_.stored(copy);
  for (const ExpertDestination& each : out_) {
    const int64_t begin = each.intermediate_begin;
    if (gated()) format.require_holds_scales(each.gate, begin, 0, gate.grid);
    format.require_holds_scales(each.up, begin, 0, up.grid);
    format.require_holds_scales(each.down, 0, begin, down.grid);
  }
}

}  // namespace cpumoe
