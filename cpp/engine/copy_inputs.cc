#include "engine/copy_inputs.h"

#include <cstddef>
#include <cstring>

#include "base/aligned_buffer.h"
#include "base/bits.h"
#include "base/float_types.h"

namespace cpumoe {
namespace {

struct alignas(AlignedBuffer::kCacheLine) CacheLine {
  std::byte bytes[AlignedBuffer::kCacheLine];
};

int64_t LinesFor(int64_t bytes) { return CeilDiv(bytes, int64_t{sizeof(CacheLine)}); }

void CopyRows(const void* from, int64_t stride, int64_t rows, int64_t row, void* to) {
  if (rows == 0) return;  // the addresses may be null
  if (stride == row) {
    std::memcpy(to, from, rows * row);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(static_cast<std::byte*>(to) + i * row,
                static_cast<const std::byte*>(from) + i * stride, row);
  }
}

}  // namespace

std::shared_ptr<const void> CopyInputs(ForwardArgs& args, int64_t hidden_size) {
  const int64_t element = ByteSize(args.input_dtype);
  const int64_t row = hidden_size * element;
  const int64_t id = args.routing.ids_are_64_bit ? 8 : 4;
  const int64_t pairs = args.tokens * args.routing.top_k;
  const int64_t rows_end = LinesFor(args.tokens * row);
  const int64_t ids_end = rows_end + LinesFor(pairs * id);
  const int64_t end = ids_end + LinesFor(pairs * int64_t{sizeof(float)});
  auto copy = std::make_shared_for_overwrite<CacheLine[]>(end);
  CacheLine* const ids = copy.get() + rows_end;
  CacheLine* const weights = copy.get() + ids_end;
  CopyRows(args.hidden_states, args.hidden_stride * element, args.tokens, row, copy.get());
  CopyRows(args.routing.ids, id, pairs, id, ids);
  CopyRows(args.routing.weights, sizeof(float), pairs, sizeof(float), weights);
  args.hidden_states = copy.get();
  args.hidden_stride = hidden_size;
  args.routing.ids = ids;
  args.routing.weights = reinterpret_cast<const float*>(weights);
  return copy;
}

}  // namespace cpumoe
