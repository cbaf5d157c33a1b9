#include "engine/weighted_sums.h"

#include <cstdint>
#include <stdexcept>

#include "base/check.h"
#include "dispatch/variant_loader.h"

namespace cpumoe {
namespace {

// No host comes near these limits. Products of numbers within them do not overflow 64 bits.
constexpr int64_t kMostRows = int64_t{1} << 32;
constexpr int64_t kMostColumns = int64_t{1} << 24;

void RequireSize(int64_t size, int64_t most, const char* name) {
  Require(size >= 0 && size <= most, name, ": expected 0 to ", most, ", got ", size);
}

// Checks `begins`, and returns the number of terms.
int64_t CheckedTerms(const WeightedSumArgs& args) {
  RequireAddress(args.begins, "begins");
  int64_t last = 0;
  for (int64_t t = 0; t <= args.tokens; ++t) {
    const int64_t begin = args.begins[t];
    Require(t == 0 ? begin == 0 : begin >= last && begin <= kMostRows,
            "begins: expected ascending numbers from 0 to ", kMostRows, ", got ", begin);
    last = begin;
  }
  return last;
}

}  // namespace

WeightedSums::WeightedSums(const std::string& isa, const std::string& origin)
    : variant_(LoadVariant(isa, origin)) {}

void WeightedSums::Execute(Runtime& runtime, const WeightedSumArgs& args) const {
  RequireSize(args.tokens, kMostRows, "tokens");
  RequireSize(args.num_rows, kMostRows, "num_rows");
  RequireSize(args.columns, kMostColumns, "columns");
  if (args.tokens == 0 || args.columns == 0) return;
  RequireAddress(args.output, "output");
  const int64_t terms = CheckedTerms(args);
  if (terms > 0) {
    RequireAddress(args.terms, "terms");
    RequireAddress(args.rows, "rows");
    RequireAddress(args.weights, "weights");
  }
  for (int64_t i = 0; i < terms; ++i) {
    const int64_t row = args.rows[i];
    if (row >= 0 && row < args.num_rows) continue;
    throw std::out_of_range(
        Message("rows[", i, "]: expected 0 to ", args.num_rows - 1, ", got ", row));
  }
  runtime.Execute([&](Node& node) { variant_.weighted_sum(args, node.pool()); });
}

}  // namespace cpumoe
