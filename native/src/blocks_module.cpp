// Products with matrices of blocks of one column, and of single weights, as Python calls them.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

constexpr std::int64_t kCrossed = 1 << 20;  // bytes of vectors side by side that the nearer caches hold

BlockRows block_rows(std::int64_t rows, std::int64_t columns, Address starts, Address places, bool wide, Address values,
                     int value, Address scales, int height) {
  return {rows,   columns, at<std::int64_t>(starts),  at<void>(places), at<void>(values), at<float>(scales),
          height, wide,    static_cast<Value>(value)};
}

// All vectors in groups of 16, 32 or 64 side by side.
class CrossedVectors {
 public:
  CrossedVectors(const BlockRows& matrix, const Inputs& inputs, int threads)
      : padded_((matrix.columns + 15) / 16 * 16) {
    const std::int64_t fitting = kCrossed / std::max<std::int64_t>(1, padded_ * 64);
    const int most = std::min(most_lines(matrix.height), fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1);
    std::size_t needed = 0;
    for (int first = 0; first < inputs.count;) {
      const int left = inputs.count - first, wanted = left > 32 ? 4 : left > 16 ? 2 : 1, lines = std::min(wanted, most);
      groups_.push_back({nullptr, lines, std::min(left, 16 * lines)});
      places_.push_back(needed);
      needed += static_cast<std::size_t>(padded_ * 16 * lines);
      first += 16 * lines;
    }
    buffer_.reset(new float[needed + 16]);
    const auto address = reinterpret_cast<std::uintptr_t>(buffer_.get());
    float* base = buffer_.get() + (64 - address % 64) % 64 / sizeof(float);
    parallel(threads, [&](int part, int parts) {
      const std::int64_t blocks = padded_ / 16, begin = blocks * part / parts * 16, end = blocks * (part + 1) / parts * 16;
      int first = 0;
      for (std::size_t i = 0; i < groups_.size(); ++i) {
        const Inputs these{inputs.data + first * inputs.stride, inputs.stride, groups_[i].count};
        kernels().blocks.cross(these, begin, end, base + places_[i], groups_[i].lines);
        first += groups_[i].count;
      }
    });
    for (std::size_t i = 0; i < groups_.size(); ++i) groups_[i].data = base + places_[i];
  }

  const std::vector<Crossed>& groups() const { return groups_; }

 private:
  std::int64_t padded_;
  std::vector<Crossed> groups_;
  std::vector<std::size_t> places_;
  std::unique_ptr<float[]> buffer_;
};

// The product with vectors side by side; those that are not finite are taken one by one.
void many(const BlockRows& matrix, std::int64_t first, std::int64_t last, const CrossedVectors& crossed,
          const Inputs& inputs, const Outputs& outputs) {
  int vector = 0;
  for (const Crossed& group : crossed.groups()) {
    kernels().blocks.many(matrix, first, last, group, {outputs.data + vector * outputs.stride, outputs.stride});
    vector += group.count;
  }
  for (int b = 0; b < inputs.count; ++b) {
    const float* x = inputs.data + b * inputs.stride;
    if (!kernels().blocks.finite(x, matrix.columns))
      kernels().blocks.few(matrix, first, last, {x, inputs.stride, 1},
                           {outputs.data + b * outputs.stride, outputs.stride});
  }
}

}  // namespace

void bind_blocks(nb::module_& m) {
  m.def("block_linear", [](std::int64_t rows, std::int64_t columns, Address starts, Address places, bool wide,
                           Address values, int value, Address scales, int height, Address inputs, std::int64_t stride,
                           int count, int input_value, Address bias, Address outputs, int output_value, int threads,
                           bool side_by_side) {
    const BlockRows matrix = block_rows(rows, columns, starts, places, wide, values, value, scales, height);
    const Prepared prepared(inputs, input_value, stride, count, columns);
    Results results(outputs, output_value, count, rows, bias);
    const Share share{matrix.starts, matrix.bands(), 2};
    std::unique_ptr<CrossedVectors> crossed;
    if (side_by_side && most_lines(height)) crossed.reset(new CrossedVectors(matrix, prepared.inputs(), std::max(threads, 1)));
    over_rows(share, threads, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t first = begin * height, last = std::min(end * height, rows);
      if (crossed) many(matrix, first, last, *crossed, prepared.inputs(), results.outputs());
      else kernels().blocks.few(matrix, first, last, prepared.inputs(), results.outputs());
      results.finish(first, last);
    });
  });
  m.def("block_expand", [](std::int64_t rows, std::int64_t columns, Address starts, Address places, bool wide,
                           Address values, int value, Address scales, int height, std::int64_t first,
                           std::int64_t last, Address target, int threads) {
    const BlockRows matrix = block_rows(rows, columns, starts, places, wide, values, value, scales, height);
    over_rows(Share{nullptr, last - first, 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().blocks.expand(matrix, first + begin, first + end, into<float>(target) + begin * columns, columns);
    });
  });
}

}  // namespace gossamer
