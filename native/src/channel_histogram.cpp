// How often magnitudes occur, binned by the upper sixteen bits of their float32 pattern: what thresholds are read from.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "magnitudes.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

constexpr std::int64_t kShare = 1 << 14;     // magnitudes that are worth a thread
constexpr std::int64_t kMostRows = 1 << 30;  // a counter has 32 bits
constexpr std::int64_t kLine = 16;           // counters of a cache line

// Held for a microsecond or two; whoever slept instead of asking again would wake up fifty later.
class BriefLock {
 public:
  explicit BriefLock(std::atomic_flag& taken) : taken_(taken) {
    while (taken_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  ~BriefLock() { taken_.clear(std::memory_order_release); }
  BriefLock(const BriefLock&) = delete;
  BriefLock& operator=(const BriefLock&) = delete;

 private:
  std::atomic_flag& taken_;
};

// Counters of one thread, all zero between uses, and where they have counted.
struct Counters {
  std::vector<std::uint32_t> counts = std::vector<std::uint32_t>(static_cast<std::size_t>(kBinLanes * kBins), 0);
  BinRange range;

  // What other work has driven out of the cache since the last use is needed at once, in no order.
  void ask_for() const {
    for (int lane = 0; lane < kBinLanes; ++lane)
      for (std::int64_t bin = range.low; bin <= range.high; bin += 16)
        __builtin_prefetch(counts.data() + lane * kBins + bin, 1);
  }

  void hand_over(std::int64_t* totals) {
    hand_over(0, 1, totals);
    hand_over(range.low, range.high + std::int64_t{1}, totals);
  }

 private:
  // All of 32768 bins would take a tenth of the time of counting a batch. Most of those in between are empty, too: their
  // totals are in memory only.
  void hand_over(std::int64_t first, std::int64_t last, std::int64_t* totals) {
    for (int lane = 0; lane < kBinLanes; ++lane)
      for (std::int64_t begin = first; begin < last; begin += kLine) {
        std::uint32_t* found = counts.data() + lane * kBins + begin;
        const std::int64_t here = std::min(kLine, last - begin);
        std::uint32_t any = 0;
        for (std::int64_t i = 0; i < here; ++i) any |= found[i];
        if (!any) continue;
        for (std::int64_t i = 0; i < here; ++i) {
          totals[begin + i] += found[i];
          found[i] = 0;
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
    std::atomic_flag handing_over = ATOMIC_FLAG_INIT;
    for (std::int64_t begin = 0; begin < rows; begin += step) {
      const std::int64_t here = std::min(step, rows - begin);
      parallel(parts, [&](int part, int all) {
        counters[part].ask_for();
        counters[part].range = kernels().count_magnitudes(numbers, begin + here * part / all,
                                                          begin + here * (part + 1) / all, counters[part].counts.data());
        // by the thread that has them in its cache, where they are wanted next time
        const BriefLock alone(handing_over);
        counters[part].hand_over(into<std::int64_t>(counts));
      });
    }
  });
}

}  // namespace gossamer
