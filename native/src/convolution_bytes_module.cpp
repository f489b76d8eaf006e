// Convolutions of whole numbers, as Python calls them: every image is rounded to bytes with a scale of its own, and then
// divided into strips.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "convolution_work.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// A byte b stands for scale · (b − zero); the scale is NaN if an input is infinite or NaN.
struct ByteGrid {
  float scale;
  std::int32_t zero;

  // 0 is always among the values, so that padding is exact
  ByteGrid(float low, float high, bool finite) {
    low = std::min(low, 0.0f);
    high = std::max(high, 0.0f);
    const float step = (high - low) / 255.0f;
    scale = !finite ? std::numeric_limits<float>::quiet_NaN() : step > 0.0f ? step : 1.0f;
    zero = finite ? static_cast<std::int32_t>(std::nearbyint(-low / scale)) : 0;
  }
};

struct Bounds {
  float low, high;
  bool finite;
};

// Least and largest value of an image; the same for any number of threads.
Bounds range_of(const float* x, std::int64_t channels, std::int64_t size, int threads) {
  std::vector<Bounds> found(static_cast<std::size_t>(std::max(1, threads)), {0.0f, 0.0f, true});
  parallel(threads, [&](int part, int parts) {
    const std::int64_t first = channels * part / parts, last = channels * (part + 1) / parts;
    Bounds own{0.0f, 0.0f, true};
    own.finite = kernels().find_range(x + first * size, (last - first) * size, own.low, own.high);
    found[static_cast<std::size_t>(part)] = own;
  });
  Bounds all = found.front();
  for (const Bounds& one : found)
    all = {std::min(all.low, one.low), std::max(all.high, one.high), all.finite && one.finite};
  return all;
}

// One image in phases, as bytes; false if a value is infinite or NaN.
bool fill_bytes(const Geometry& shape, const Phases& phases, std::int64_t channels, const ByteGrid& grid,
                const float* x, std::uint8_t* target, int threads) {
  std::atomic<bool> finite{true};
  const float inverse = 1.0f / grid.scale;
  const auto zero = static_cast<std::uint8_t>(grid.zero);
  const std::int64_t step = shape.stride[1];
  parallel(threads, [&](int part, int parts) {
    bool own = true;
    float* line = scratch(2, static_cast<std::size_t>(phases.width));
    for (std::int64_t channel = channels * part / parts; channel < channels * (part + 1) / parts; ++channel)
      for (std::size_t phase = 0; phase < phases.rows.size(); ++phase) {
        const float* source = x + channel * shape.height * shape.width;
        std::uint8_t* there = target + (static_cast<std::int64_t>(phase) * channels + channel) * phases.stride;
        for (std::int64_t row = 0; row < phases.height; ++row, there += phases.width) {
          const std::int64_t from = row * shape.stride[0] + phases.rows[phase] - shape.padding[0];
          const std::int64_t first = phases.columns[phase] - shape.padding[1];
          const bool inside = from >= 0 && from < shape.height;
          const auto [begin, end] = Inside(shape, first, inside ? phases.width : 0);
          std::fill(there, there + begin, zero);
          std::fill(there + end, there + phases.width, zero);
          if (begin == end) continue;
          const float* values = source + from * shape.width + first + begin * step;
          if (step > 1) {
            take_every(step, values, end - begin, line);
            values = line;
          }
          own &= kernels().round_to_bytes(values, end - begin, inverse, static_cast<float>(grid.zero), there + begin);
        }
      }
    if (!own) finite = false;
  });
  return finite;
}

// One image: a convolution that moves over every position has no rows, only positions.
void convolve_image(const ByteBlocks& matrix, const Geometry& shape, const ByteGrid& grid, const float* x, float* y,
                    int threads) {
  const Phases phases(shape, matrix.inputs);
  const auto used = phases.rows.size() * static_cast<std::size_t>(matrix.inputs * phases.stride);
  const std::size_t size = phases.size(matrix.inputs) + kBytePositions;
  auto* inputs = reinterpret_cast<std::uint8_t*>(scratch(1, size / sizeof(float) + 1));
  std::fill(inputs + used, inputs + size, std::uint8_t{0});
  if (!fill_bytes(shape, phases, matrix.inputs, grid, x, inputs, threads) || std::isnan(grid.scale)) {
    std::fill_n(y, matrix.outputs * shape.positions(), std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const Division division((phases.stride + kBytePositions - 1) / kBytePositions, threads);
  divide(matrix, division, threads, [&](std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
    for (std::int64_t number = first; number < last; ++number) {
      Run runs[kBytePositions];
      const std::int64_t start = number * kBytePositions, stop = std::min(phases.stride, start + kBytePositions);
      const int count = runs_of(shape, phases, matrix.outputs, start, stop, runs);
      if (!count) continue;
      ByteStrip strip{inputs + start, phases.stride, phases.taps.data(), grid.scale, grid.zero, {}};
      strip.to.runs = runs;
      strip.to.run_count = count;
      strip.to.outputs = y;
      strip.to.output_stride = shape.positions();
      kernels().convolution_bytes(matrix, begin, end, strip);
    }
  });
}

void convolve(const ByteBlocks& matrix, Geometry shape, bool known, float least, float most, const float* x, float* y,
              int threads) {
  const std::int64_t images = shape.batch, positions = shape.positions();
  const std::int64_t size = shape.height * shape.width;
  shape.batch = 1;
  if (shape.pointwise()) {
    shape.width = shape.out_width = size;
    shape.height = shape.out_height = 1;
  }
  for (std::int64_t image = 0; image < images; ++image) {
    const float* from = x + image * matrix.inputs * size;
    const Bounds range = known ? Bounds{least, most, true} : range_of(from, matrix.inputs, size, threads);
    const ByteGrid grid(range.low, range.high, range.finite);
    convolve_image(matrix, shape, grid, from, y + image * matrix.outputs * positions, threads);
  }
}

}  // namespace

void bind_convolution_bytes(nb::module_& m) {
  m.def("convolution_bytes", [](std::int64_t outputs, std::int64_t inputs, int block, Address starts, Address places,
                                Address values, Address scales, Address totals, Address bias, float low, float high,
                                Address x, std::int64_t batch, std::int64_t height, std::int64_t width,
                                std::int64_t out_height, std::int64_t out_width, int kernel_height, int kernel_width,
                                int stride_height, int stride_width, int pad_height, int pad_width,
                                int dilation_height, int dilation_width, bool known, float least, float most,
                                Address y, int threads) {
    const Geometry shape{batch, height, width, out_height, out_width, {kernel_height, kernel_width},
                         {stride_height, stride_width}, {pad_height, pad_width}, {dilation_height, dilation_width}};
    const ByteBlocks matrix{outputs,
                            inputs,
                            block,
                            kernel_height * kernel_width,
                            reinterpret_cast<const std::int64_t*>(starts),
                            reinterpret_cast<const std::int32_t*>(places),
                            reinterpret_cast<const std::int8_t*>(values),
                            reinterpret_cast<const float*>(scales),
                            reinterpret_cast<const std::int32_t*>(totals),
                            reinterpret_cast<const float*>(bias),
                            low,
                            high};
    nb::gil_scoped_release unlocked;
    convolve(matrix, shape, known, least, most, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y),
             threads);
  });
}

}  // namespace gossamer
