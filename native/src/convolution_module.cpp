// Convolutions with sparse weights, as Python calls them: what is divided into strips, and who works on them.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "convolution_work.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// What a strip of a convolution with kernels of one weight reads and writes.
struct PackedStrip {
  Run runs[kMostVectors * 16];
  Strip strip;

  // Copy the inputs of the positions from `first` on side by side; returns where the next strip can be copied to.
  float* pack(const ConvolutionBlocks& matrix, const Geometry& shape, const float* x, std::int64_t first,
              std::int64_t width, float* inputs) {
    static const std::int64_t tap = 0;
    const std::int64_t size = shape.positions(), all = shape.batch * size;
    Run from[kMostVectors * 16];
    int count = 0;
    std::int64_t filled = 0;
    for (std::int64_t position = first; filled < width && position < all;) {
      const std::int64_t image = position / size, place = position % size;
      const std::int64_t length = std::min({size - place, width - filled});
      runs[count] = {filled, image * matrix.outputs * size + place, length};
      from[count++] = {filled, image * matrix.inputs * size + place, length};
      filled += length;
      position += length;
    }
    const int needed = static_cast<int>((filled + 15) / 16), used = needed == 5 ? 6 : needed == 7 ? 8 : needed;
    const std::int64_t line = 16 * used;
    bool finite = true;
    for (int run = 0; run < count; ++run)
      finite &= kernels().gather(x + from[run].to, size, inputs + from[run].from, line, from[run].length,
                                 matrix.inputs);
    if (filled < line)
      for (std::int64_t channel = 0; channel < matrix.inputs; ++channel)
        std::fill(inputs + channel * line + filled, inputs + (channel + 1) * line, 0.0f);
    strip = {inputs, line, &tap, runs, count, used, !finite, nullptr, nullptr, size};
    return inputs + matrix.inputs * line;
  }
};

// Weights of the largest block, if they have to be made floats before they are used.
std::int64_t room_for_halves(const ConvolutionBlocks& matrix) {
  std::int64_t most = 0;
  if (matrix.halves)
    for (std::int64_t block = 0; block * matrix.block < matrix.outputs; ++block)
      most = std::max(most, matrix.starts[block + 1] - matrix.starts[block]);
  return most * matrix.taps * matrix.block;
}

constexpr std::int64_t kPacked = 1 << 15;  // floats of inputs that are packed at a time, where they are several strips
constexpr int kMostStrips = 8;
constexpr std::int64_t kChannels = 4;  // outputs that are worked on before the next strip goes on with the same ones

// Kernels of one weight: a strip is copied side by side first. That makes its inputs aligned, keeps them in the
// nearest cache whatever the distance of the channels, and joins positions of several images. Where there are few
// input channels, several strips are taken together, so that every output channel is written in longer pieces.
void pointwise(const ConvolutionBlocks& matrix, const Geometry& shape, const float* x, float* y, int vectors,
               int threads) {
  const std::int64_t width = 16 * vectors, strips = (shape.batch * shape.positions() + width - 1) / width;
  const std::int64_t fitting = kPacked / std::max<std::int64_t>(1, matrix.inputs * width);
  const std::int64_t most = std::min({fitting, strips / (4 * threads), static_cast<std::int64_t>(kMostStrips)});
  const std::int64_t taken = std::max<std::int64_t>(1, most);
  const std::int64_t blocks = std::max<std::int64_t>(1, kChannels / matrix.block), halves = room_for_halves(matrix);
  const Division division((strips + taken - 1) / taken, threads);
  divide(matrix, division, threads, [&](std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
    float* inputs = scratch(0, static_cast<std::size_t>(matrix.inputs * width * taken));
    float* weights = halves ? scratch(2, static_cast<std::size_t>(halves)) : nullptr;
    PackedStrip packed[kMostStrips];
    for (std::int64_t number = first; number < last; ++number) {
      const std::int64_t here = std::min(taken, strips - number * taken);
      float* there = inputs;
      for (std::int64_t i = 0; i < here; ++i) {
        there = packed[i].pack(matrix, shape, x, (number * taken + i) * width, width, there);
        packed[i].strip.weights = weights;
        packed[i].strip.outputs = y;
      }
      if (here == 1) {
        kernels().convolution(matrix, begin, end, packed[0].strip);
        continue;
      }
      for (std::int64_t block = begin; block < end; block += blocks)
        for (std::int64_t i = 0; i < here; ++i)
          kernels().convolution(matrix, block, std::min(end, block + blocks), packed[i].strip);
    }
  });
}

// One row of one phase; false if an input is infinite or NaN.
bool fill_row(const Geometry& shape, std::int64_t first, const float* source, std::int64_t pixel, float* target,
              std::int64_t width) {
  const std::int64_t step = shape.stride[1] * pixel;
  const auto [begin, end] = Inside(shape, first, width);
  std::fill(target, target + begin, 0.0f);
  std::fill(target + end, target + width, 0.0f);
  const float* from = source + first + begin;
  if (step > 1) {
    take_every(step, source + first * pixel + begin * step, end - begin, target + begin);
    from = target + begin;
  }
  return kernels().gather(from, 0, target + begin, end - begin + 1, end - begin, 1);
}

// `pixel` is the distance of adjacent positions: 1, or the number of channels where these come last.
bool fill_phases(const Geometry& shape, const Phases& phases, std::int64_t channels, const float* x, std::int64_t pixel,
                 float* target, int threads) {
  std::atomic<bool> finite{true};
  parallel(threads, [&](int part, int parts) {
    bool own = true;
    for (std::int64_t channel = channels * part / parts; channel < channels * (part + 1) / parts; ++channel)
      for (std::size_t phase = 0; phase < phases.rows.size(); ++phase)
        for (std::int64_t image = 0; image < shape.batch; ++image) {
          const std::int64_t size = shape.height * shape.width;
          const float* source = x + image * channels * size + channel * (pixel > 1 ? 1 : size);
          float* there = target + (static_cast<std::int64_t>(phase) * channels + channel) * phases.stride +
                         image * phases.height * phases.width;
          for (std::int64_t row = 0; row < phases.height; ++row, there += phases.width) {
            const std::int64_t from = row * shape.stride[0] + phases.rows[phase] - shape.padding[0];
            if (from < 0 || from >= shape.height) std::fill(there, there + phases.width, 0.0f);
            else
              own &= fill_row(shape, phases.columns[phase] - shape.padding[1], source + from * shape.width * pixel,
                              pixel, there, phases.width);
          }
        }
    if (!own) finite = false;
  });
  return finite;
}

void spread_kernel(const ConvolutionBlocks& matrix, const Geometry& shape, const float* x, std::int64_t pixel, float* y,
                   int vectors, int threads) {
  const Phases phases(shape, matrix.inputs);
  const std::size_t size = phases.size(matrix.inputs);
  float* inputs = scratch(1, size);
  const auto used = phases.rows.size() * static_cast<std::size_t>(matrix.inputs * phases.stride);
  std::fill(inputs + used, inputs + size, 0.0f);
  const bool finite = fill_phases(shape, phases, matrix.inputs, x, pixel, inputs, threads);
  const std::int64_t width = 16 * vectors, all = phases.stride, halves = room_for_halves(matrix);
  const Division division((all + width - 1) / width, threads);
  divide(matrix, division, threads, [&](std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
    float* weights = halves ? scratch(2, static_cast<std::size_t>(halves)) : nullptr;
    for (std::int64_t number = first; number < last; ++number) {
      Run runs[kMostVectors * 16];
      const std::int64_t start = number * width, stop = std::min(all, start + width);
      const int count = runs_of(shape, phases, matrix.outputs, start, stop, runs);
      if (!count) continue;
      const Strip strip{inputs + start, phases.stride, phases.taps.data(), runs, count, vectors, !finite, weights, y,
                        shape.positions()};
      kernels().convolution(matrix, begin, end, strip);
    }
  });
}

// The rows of an image in phases, without the zeros around them.
std::vector<Run> rows_of(const Geometry& shape, const Phases& phases) {
  std::vector<Run> found;
  for (std::size_t phase = 0; phase < phases.rows.size(); ++phase)
    for (std::int64_t row = 0; row < phases.height; ++row) {
      const std::int64_t from = row * shape.stride[0] + phases.rows[phase] - shape.padding[0];
      const std::int64_t first = phases.columns[phase] - shape.padding[1];
      const auto [begin, end] = Inside(shape, first, phases.width);
      if (from < 0 || from >= shape.height || begin == end) continue;
      const std::int64_t to = static_cast<std::int64_t>(phase) * phases.stride + row * phases.width + begin;
      found.push_back({from * shape.width + first + begin * shape.stride[1], to, end - begin});
    }
  return found;
}

// The taps of one channel that are not zero, side by side: a pattern of rows, for instance.
struct KeptTaps {
  std::vector<std::int64_t> taps;
  std::vector<float> weights;

  explicit KeptTaps(int most) : taps(static_cast<std::size_t>(most)), weights(static_cast<std::size_t>(most)) {}

  int fill(const Phases& phases, const float* from, int count) {
    int kept = 0;
    for (int tap = 0; tap < count; ++tap)
      if (from[tap] != 0.0f) {  // NaN is kept
        taps[static_cast<std::size_t>(kept)] = phases.taps[static_cast<std::size_t>(tap)];
        weights[static_cast<std::size_t>(kept++)] = from[tap];
      }
    return kept;
  }
};

// Every channel by itself: a copy with zeros around it, all positions of it side by side, and the rows of the result
// without the columns between them. Weights of zero are left out of the sum where all inputs are finite.
void depthwise(Geometry shape, std::int64_t channels, const float* weights, const float* bias, float low, float high,
               const float* x, float* y, int threads) {
  const std::int64_t planes = shape.batch * channels;
  shape.batch = 1;
  const Phases phases(shape, 1);
  const std::vector<Run> rows = rows_of(shape, phases);
  std::vector<Run> results;
  for (std::int64_t row = 0; row < shape.out_height; ++row)
    results.push_back({row * phases.width, row * shape.out_width, shape.out_width});
  const auto read = static_cast<std::int64_t>(rows.size()), written = static_cast<std::int64_t>(results.size());
  const int taps = shape.kernel[0] * shape.kernel[1], step = shape.stride[1];
  const std::int64_t positions = (shape.out_height - 1) * phases.width + shape.out_width;
  parallel(threads, [&](int part, int parts) {
    float* inputs = scratch(1, phases.size(1));
    std::fill_n(inputs, phases.size(1), 0.0f);  // what lies around an image is the same for all of them
    float* outputs = scratch(0, static_cast<std::size_t>(positions) + kMostVectors * 16);
    KeptTaps kept(taps);
    for (std::int64_t plane = planes * part / parts; plane < planes * (part + 1) / parts; ++plane) {
      const float* source = x + plane * shape.height * shape.width;
      const bool finite = kernels().copy_runs(rows.data(), read, step, source, inputs);
      const std::int64_t channel = plane % channels;
      const float added = bias ? bias[channel] : 0.0f;
      Plane one{inputs, phases.taps.data(), weights + channel * taps, taps, added, low, high};
      const int left = finite ? kept.fill(phases, one.weights, taps) : taps;
      if (left < taps)
        one = {inputs, kept.taps.data(), kept.weights.data(), left, added, low, high};
      kernels().depthwise(one, positions, outputs);
      kernels().copy_runs(results.data(), written, 1, outputs, y + plane * shape.positions());
    }
  });
}

}  // namespace

void bind_convolution(nb::module_& m) {
  m.def("convolution", [](std::int64_t outputs, std::int64_t inputs, int block, Address starts, Address places,
                          Address values, Address halves, Address bias, float low, float high, Address x,
                          std::int64_t pixel, std::int64_t batch, std::int64_t height, std::int64_t width,
                          std::int64_t out_height, std::int64_t out_width, int kernel_height, int kernel_width,
                          int stride_height, int stride_width, int pad_height, int pad_width, int dilation_height,
                          int dilation_width, Address y, int vectors, int threads) {
    const Geometry shape{batch, height, width, out_height, out_width, {kernel_height, kernel_width},
                         {stride_height, stride_width}, {pad_height, pad_width}, {dilation_height, dilation_width}};
    const ConvolutionBlocks matrix{outputs,
                                   inputs,
                                   block,
                                   kernel_height * kernel_width,
                                   reinterpret_cast<const std::int64_t*>(starts),
                                   reinterpret_cast<const std::int32_t*>(places),
                                   reinterpret_cast<const float*>(values),
                                   reinterpret_cast<const std::uint16_t*>(halves),
                                   0,
                                   reinterpret_cast<const float*>(bias),
                                   low,
                                   high};
    nb::gil_scoped_release unlocked;
    const auto* source = reinterpret_cast<const float*>(x);
    auto* target = reinterpret_cast<float*>(y);
    if (shape.pointwise()) pointwise(matrix, shape, source, target, vectors, threads);
    else spread_kernel(matrix, shape, source, pixel, target, vectors, threads);
  });
  m.def("depthwise", [](std::int64_t channels, Address weights, Address bias, float low, float high, Address x,
                        std::int64_t batch, std::int64_t height, std::int64_t width, std::int64_t out_height,
                        std::int64_t out_width, int kernel_height, int kernel_width, int stride_height,
                        int stride_width, int pad_height, int pad_width, int dilation_height, int dilation_width,
                        Address y, int threads) {
    const Geometry shape{batch, height, width, out_height, out_width, {kernel_height, kernel_width},
                         {stride_height, stride_width}, {pad_height, pad_width}, {dilation_height, dilation_width}};
    nb::gil_scoped_release unlocked;
    depthwise(shape, channels, reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(bias), low, high,
              reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), threads);
  });
}

}  // namespace gossamer
