#include "cpp/test_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cpp/all_formats.h"

namespace cpumoe {

TestMatrix::TestMatrix(const std::string& format, int64_t rows, int64_t columns, int64_t gap)
    : rows_(rows), columns_(columns) {
  VisitFormat(format, [&]<class F>(F) {
    codes_stride_ = columns * F::kCodeBits / 8 + gap;
    scales_stride_ =
        columns / F::kGroupSize * static_cast<int64_t>(sizeof(typename F::Scale)) + gap;
  });
  // The last row has no gap behind it, so that a sanitizer notices reads beyond it.
  codes_.assign(rows * codes_stride_ - gap, kFiller);
  scales_.assign(rows * scales_stride_ - gap, kFiller);
}

TestMatrix TestMatrix::Random(const std::string& format, int64_t rows, int64_t columns, Rng& rng,
                              const Magnitudes& magnitudes, int64_t gap) {
  TestMatrix matrix(format, rows, columns, gap);
  VisitFormat(format, [&]<class F>(F) {
    using Scale = typename F::Scale;
    std::vector<Scale> scales;
    for (const Scale scale : ValidScales<F>()) {
      const float magnitude = std::fabs(scale.ToFloat());
      if (magnitude >= magnitudes.least && magnitude <= magnitudes.greatest) {
        scales.push_back(scale);
      }
    }
    if (scales.empty()) throw std::invalid_argument("the format has no scale of such a magnitude");
    const MutableRawMatrix view = matrix.MutableView();
    for (int64_t row = 0; row < rows; ++row) {
      std::generate_n(view.codes + row * view.codes_stride, columns * F::kCodeBits / 8,
                      [&] { return static_cast<std::byte>(rng()); });
      std::byte* out = view.scales + row * view.scales_stride;
      for (int64_t g = 0; g < columns / F::kGroupSize; ++g, out += sizeof(Scale)) {
        std::memcpy(out, &scales[rng() % scales.size()], sizeof(Scale));
      }
    }
  });
  return matrix;
}

}  // namespace cpumoe
