// What the kernel that counts magnitudes works on.
#pragma once

#include <cstdint>

namespace gossamer {

enum class Value : int;

struct MagnitudeRows {
  const void* data;
  Value value;           // float32 or bfloat16
  std::int64_t stride;   // of rows
  std::int64_t columns;
  const float* scales;   // columns, or null
};

constexpr std::int64_t kBins = 1 << 15;  // of the upper sixteen bits of a float32 without a sign
constexpr int kBinLanes = 2;             // sets of counters: equal bins in a row would wait for each other in one

// The bins besides 0 that something fell into lie between these two.
struct BinRange {
  std::uint16_t low = kBins - 1;
  std::uint16_t high = 0;
};

}  // namespace gossamer
