// How often magnitudes occur, binned by the upper sixteen bits of their float32 pattern: what thresholds are read from.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

constexpr std::int64_t kBins = 1 << 15;  // a magnitude has no sign, so that the upper half never occurs
constexpr int kLanes = 2;                // equal bins in a row would wait for each other in one counter
constexpr std::int64_t kBinsAtOnce = 64;
constexpr std::int64_t kAtOnce = 512;    // magnitudes whose bins are found before they are counted
constexpr std::int64_t kShare = 1 << 14; // magnitudes that are worth a thread
constexpr std::int64_t kMostRows = 1 << 30;  // a counter has 32 bits

using Counts = std::vector<std::uint32_t>;

struct Numbers {
  Address data;
  Value value;
  std::int64_t stride;   // of rows
  std::int64_t columns;
  const float* scales;   // columns, or null
};

void find_bins(const Numbers& numbers, std::int64_t row, std::int64_t column, std::int64_t count, std::uint16_t* bins) {
  float wide[kAtOnce];
  const std::int64_t from = row * numbers.stride + column;
  if (numbers.value == Value::float32) std::memcpy(wide, at<float>(numbers.data) + from, sizeof(float) * count);
  else kernels().widen_bfloat16(at<std::uint16_t>(numbers.data) + from, wide, count);
  if (numbers.scales)
    for (std::int64_t i = 0; i < count; ++i) wide[i] *= numbers.scales[column + i];
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, wide + i, 4);
    bins[i] = static_cast<std::uint16_t>(bits >> 16 & 0x7fffu);  // without the sign
  }
}

void count_rows(const Numbers& numbers, std::int64_t first, std::int64_t last, std::uint32_t* counts) {
  std::uint16_t bins[kAtOnce];
  for (std::int64_t row = first; row < last; ++row)
    for (std::int64_t column = 0; column < numbers.columns; column += kAtOnce) {
      const std::int64_t count = std::min(kAtOnce, numbers.columns - column);
      find_bins(numbers, row, column, count, bins);
      std::int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) ++counts[lane * kBins + bins[i + lane]];
      for (; i < count; ++i) ++counts[bins[i]];
    }
}

// Adds kBinsAtOnce counters to the totals and zeroes them; most have counted nothing.
void hand_over(std::uint32_t* counts, std::int64_t* totals) {
  std::uint32_t some = 0;
  for (std::int64_t bin = 0; bin < kBinsAtOnce; ++bin) some |= counts[bin];
  if (!some) return;
  for (std::int64_t bin = 0; bin < kBinsAtOnce; ++bin) {
    totals[bin] += counts[bin];
    counts[bin] = 0;
  }
}

}  // namespace

void bind_channel_histogram(nb::module_& m) {
  m.def("magnitude_histogram", [](std::int64_t rows, std::int64_t columns, Address data, int value, std::int64_t stride,
                                  Address scales, Address counts, int threads) {
    nb::gil_scoped_release unlocked;
    const Numbers numbers{data, static_cast<Value>(value), stride, columns, at<float>(scales)};
    const auto parts = static_cast<int>(std::clamp<std::int64_t>(rows * columns / kShare, 1, std::max(threads, 1)));
    const std::int64_t step = std::max<std::int64_t>(1, kMostRows / std::max<std::int64_t>(columns, 1) * parts);
    auto* totals = into<std::int64_t>(counts);
    for (std::int64_t begin = 0; begin < rows; begin += step) {
      const std::int64_t here = std::min(step, rows - begin);
      static thread_local Counts memory;  // all zero between uses: clearing it would cost more than counting
      memory.resize(static_cast<std::size_t>(parts * kLanes * kBins), 0);
      std::uint32_t* found = memory.data();
      parallel(parts, [&](int part, int all) {
        count_rows(numbers, begin + here * part / all, begin + here * (part + 1) / all, found + part * kLanes * kBins);
      });
      for (int lane = 0; lane < parts * kLanes; ++lane)
        for (std::int64_t bin = 0; bin < kBins; bin += kBinsAtOnce) hand_over(found + lane * kBins + bin, totals + bin);
    }
  });
}

}  // namespace gossamer
