// Counting magnitudes by the upper sixteen bits of their float32 pattern.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library. Loops over bins are left to the compiler.

constexpr std::int64_t kBinsAtOnce = 512;  // magnitudes whose bins are found before they are counted

// Bins of sixteen-bit patterns, and between which of them all but 0 lie.
inline void find_bins(const std::uint16_t* patterns, std::int64_t count, std::uint16_t* bins, BinRange& range) {
  std::uint16_t before = static_cast<std::uint16_t>(range.low - 1), high = range.high;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bin = static_cast<std::uint16_t>(patterns[i] & 0x7fffu);
    const auto below = static_cast<std::uint16_t>(bin - 1);  // of 0 the largest there is
    bins[i] = bin;
    before = below < before ? below : before;
    high = bin > high ? bin : high;
  }
  range = {static_cast<std::uint16_t>(before + 1), high};
}

// The upper halves of numbers that are multiplied with scales, from float32 or from bfloat16.
inline void upper_halves(const float* numbers, const float* scales, std::int64_t count, std::uint16_t* patterns) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float scaled = scales ? numbers[i] * scales[i] : numbers[i];
    std::uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    patterns[i] = static_cast<std::uint16_t>(bits >> 16);
  }
}

inline void upper_halves(const std::uint16_t* numbers, const float* scales, std::int64_t count,
                         std::uint16_t* patterns) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float scaled = as_float(std::uint32_t{numbers[i]} << 16) * scales[i];
    std::uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    patterns[i] = static_cast<std::uint16_t>(bits >> 16);
  }
}

inline void find_bins(const MagnitudeRows& rows, std::int64_t row, std::int64_t column, std::int64_t count,
                      std::uint16_t* bins, BinRange& range) {
  const std::int64_t from = row * rows.stride + column;
  const float* scales = rows.scales ? rows.scales + column : nullptr;
  const auto* halves = static_cast<const std::uint16_t*>(rows.data) + from;
  if (rows.value == Value::bfloat16 && !scales) return find_bins(halves, count, bins, range);
  std::uint16_t patterns[kBinsAtOnce];
  if (rows.value == Value::bfloat16) upper_halves(halves, scales, count, patterns);
  else upper_halves(static_cast<const float*>(rows.data) + from, scales, count, patterns);
  find_bins(patterns, count, bins, range);
}

// Adds to kBinLanes sets of kBins counters.
BinRange count_magnitudes(const MagnitudeRows& rows, std::int64_t first, std::int64_t last, std::uint32_t* counts) {
  BinRange range;
  std::uint16_t bins[kBinsAtOnce];
  for (std::int64_t row = first; row < last; ++row)
    for (std::int64_t column = 0; column < rows.columns; column += kBinsAtOnce) {
      const std::int64_t left = rows.columns - column, count = left < kBinsAtOnce ? left : kBinsAtOnce;
      find_bins(rows, row, column, count, bins, range);
      std::int64_t i = 0;
      for (; i + kBinLanes <= count; i += kBinLanes)
        for (int lane = 0; lane < kBinLanes; ++lane) ++counts[lane * kBins + bins[i + lane]];
      for (; i < count; ++i) ++counts[bins[i]];
    }
  return range;
}
