// The highest scores of long rows, exactly so many, without sorting: digit by digit the threshold is found by counting.
//
// Floats become whole numbers of the same order. A pass counts how often each value of the eleven highest bits occurs,
// the next picks out the scores that share those of the threshold, of which the following bits are counted. Of scores
// that equal the threshold the later are kept. Threads count ranges of a row, so that nothing depends on their number.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Address = std::uintptr_t;

constexpr int kDigits = 3;
constexpr int kShifts[kDigits] = {21, 10, 0};
constexpr int kBins = 1 << 11;
constexpr int kLanes = 4;  // equal digits in a row would wait for each other in one counter
constexpr std::int64_t kShare = 1 << 16;  // scores that are worth a thread

using Counts = std::array<std::uint32_t, kBins>;

inline std::uint32_t key_of(float score) {
  std::uint32_t bits;
  score += 0.0f;  // −0 is as high as +0
  std::memcpy(&bits, &score, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

inline float score_of(std::uint32_t key) {
  const std::uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

inline std::uint32_t digit_of(std::uint32_t key, int digit) { return key >> kShifts[digit] & (digit == 2 ? 0x3ffu : 0x7ffu); }

// How often each value of a digit occurs among the scores whose digits before it are those of `prefix`.
void count_digits(const float* scores, std::int64_t count, int digit, std::uint32_t prefix, Counts& counts) {
  std::array<Counts, kLanes> lanes;
  for (Counts& lane : lanes) lane.fill(0);
  if (digit == 0) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) ++lanes[lane][digit_of(key_of(scores[i + lane]), 0)];
    for (; i < count; ++i) ++lanes[0][digit_of(key_of(scores[i]), 0)];
  } else {
    const int above = kShifts[digit - 1];
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t key = key_of(scores[i]);
      lanes[i % kLanes][digit_of(key, digit)] += key >> above == prefix >> above;
    }
  }
  for (int bin = 0; bin < kBins; ++bin) {
    counts[bin] = 0;
    for (const Counts& lane : lanes) counts[bin] += lane[bin];
  }
}

// The scores whose first digit is that of `prefix`.
std::vector<float> share_first(const float* scores, std::int64_t count, std::uint32_t prefix, std::uint32_t expected) {
  std::vector<float> found(expected + 1);
  std::size_t next = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    found[next] = scores[i];
    next += digit_of(key_of(scores[i]), 0) == prefix >> kShifts[0];
  }
  found.resize(next);
  return found;
}

// keep[i] = whether score i is among the count − dropped highest, for 0 < dropped < count.
void keep_highest(const float* scores, std::int64_t count, std::int64_t dropped, std::uint8_t* keep, int threads) {
  const auto parts = static_cast<int>(std::clamp<std::int64_t>(count / kShare, 1, threads));
  const auto begin = [&](int part) { return count * part / parts; };
  std::vector<Counts> counts(static_cast<std::size_t>(parts));
  std::vector<std::vector<float>> candidates(static_cast<std::size_t>(parts));
  std::uint32_t threshold = 0;
  std::int64_t left = dropped;  // of those that share the digits of the threshold so far
  for (int digit = 0; digit < kDigits; ++digit) {
    parallel(parts, [&](int part, int) {
      const std::int64_t here = begin(part + 1) - begin(part);
      if (digit == 1)
        candidates[part] = share_first(scores + begin(part), here, threshold, counts[part][threshold >> kShifts[0]]);
      const float* from = digit ? candidates[part].data() : scores + begin(part);
      const auto size = digit ? static_cast<std::int64_t>(candidates[part].size()) : here;
      count_digits(from, size, digit, threshold, counts[part]);
    });
    std::uint32_t bin = 0;
    for (;; ++bin) {
      std::int64_t here = 0;
      for (const Counts& each : counts) here += each[bin];
      if (left <= here) break;
      left -= here;
    }
    threshold |= bin << kShifts[digit];
  }
  // `left` scores that equal the threshold go, the first ones
  std::vector<std::int64_t> going(static_cast<std::size_t>(parts));
  for (int part = 0; part < parts; ++part) {
    going[part] = left;
    left = std::max<std::int64_t>(0, left - counts[part][digit_of(threshold, kDigits - 1)]);
  }
  const float limit = score_of(threshold);
  parallel(parts, [&](int part, int) {
    std::int64_t rest = going[part];
    std::int64_t i = begin(part);
    const std::int64_t end = begin(part + 1);
    for (; i < end && rest; ++i) {
      keep[i] = scores[i] > limit;
      rest -= scores[i] == limit;
    }
    for (; i < end; ++i) keep[i] = scores[i] >= limit;
  });
}

}  // namespace

void bind_selection(nb::module_& m) {
  m.def("keep_highest_of_long_rows", [](std::int64_t rows, std::int64_t columns, std::int64_t dropped, Address scores,
                                        Address keep, int threads) {
    nb::gil_scoped_release unlocked;
    threads = std::max(threads, 1);
    const auto* from = reinterpret_cast<const float*>(scores);
    auto* to = reinterpret_cast<std::uint8_t*>(keep);
    if (rows < 2 * threads) {
      for (std::int64_t row = 0; row < rows; ++row)
        keep_highest(from + row * columns, columns, dropped, to + row * columns, threads);
      return;
    }
    parallel(threads, [&](int part, int parts) {
      for (std::int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
        keep_highest(from + row * columns, columns, dropped, to + row * columns, 1);
    });
  });
}

}  // namespace gossamer
