// How often magnitudes occur, binned by the upper sixteen bits of their float32 pattern: what thresholds are read from.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "magnitudes.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

constexpr std::int64_t kShare = 1 << 14;     // magnitudes that are worth a thread
constexpr std::int64_t kMostRows = 1 << 30;  // a counter has 32 bits

// Counters of one thread, all zero between uses, and where they have counted.
struct Counters {
  std::vector<std::uint32_t> counts = std::vector<std::uint32_t>(static_cast<std::size_t>(kBinLanes * kBins), 0);
  BinRange range;

  void hand_over(std::int64_t* totals) {
    hand_over(0, 1, totals);
    hand_over(range.low, range.high + std::int64_t{1}, totals);
  }

 private:
  // All of 32768 bins would take a tenth of the time of counting a batch.
  void hand_over(std::int64_t first, std::int64_t last, std::int64_t* totals) {
    for (int lane = 0; lane < kBinLanes; ++lane) {
      std::uint32_t* found = counts.data() + lane * kBins;
      for (std::int64_t bin = first; bin < last; ++bin) {
        totals[bin] += found[bin];
        found[bin] = 0;
      }
    }
  }
};

}  // namespace

void bind_channel_histogram(nb::module_& m) {
  m.def("magnitude_histogram", [](std::int64_t rows, std::int64_t columns, Address data, int value, std::int64_t stride,
                                  Address scales, Address counts, int threads) {
    nb::gil_scoped_release unlocked;
    const MagnitudeRows numbers{at<void>(data), static_cast<Value>(value), stride, columns, at<float>(scales)};
    const auto parts = static_cast<int>(std::clamp<std::int64_t>(rows * columns / kShare, 1, std::max(threads, 1)));
    const std::int64_t step = std::max<std::int64_t>(1, kMostRows / std::max<std::int64_t>(columns, 1) * parts);
    static thread_local std::vector<Counters> memory;
    if (memory.size() < static_cast<std::size_t>(parts)) memory.resize(static_cast<std::size_t>(parts));
    Counters* counters = memory.data();  // the name means another in every thread
    std::mutex handing_over;
    for (std::int64_t begin = 0; begin < rows; begin += step) {
      const std::int64_t here = std::min(step, rows - begin);
      parallel(parts, [&](int part, int all) {
        counters[part].range = kernels().count_magnitudes(numbers, begin + here * part / all,
                                                          begin + here * (part + 1) / all, counters[part].counts.data());
        // by the thread that has them in its cache, where they are wanted next time
        const std::lock_guard<std::mutex> alone(handing_over);
        counters[part].hand_over(into<std::int64_t>(counts));
      });
    }
  });
}

}  // namespace gossamer
