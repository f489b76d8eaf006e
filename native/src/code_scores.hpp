// Scores of features for groups of 32 tokens, which are the lanes: tokens are packed so that a channel of all of them
// lies together, and features are read as they are stored.
//
// Included by code_kernels.cpp, inside its namespace.

#if defined(__AVX512F__)
constexpr int kScoreRows = 12, kHalves = 2;
#elif defined(__AVX2__)
constexpr int kScoreRows = 6, kHalves = 1;
#else
constexpr int kScoreRows = 2, kHalves = 1;
#endif

template <int Rows>
inline void score_rows(const ScoreTile& tile, int row, int half) {
  const float* features = static_cast<const float*>(tile.features) + row * tile.size;
  const float* tokens = static_cast<const float*>(tile.tokens) + 16 * half;
  Lanes sums[Rows][kHalves];
  for (auto& pair : sums)
    for (Lanes& sum : pair) sum = zero();
  for (std::int64_t channel = 0; channel < tile.size; ++channel) {
    Lanes here[kHalves];
    for (int h = 0; h < kHalves; ++h) here[h] = load(tokens + channel * kTokens + 16 * h);
    for (int r = 0; r < Rows; ++r) {
      const Lanes weight = spread(features[r * tile.size + channel]);
      for (int h = 0; h < kHalves; ++h) sums[r][h] = multiply_add(weight, here[h], sums[r][h]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int h = 0; h < kHalves; ++h) store(tile.scores + (row + r) * kTokens + 16 * (half + h), sums[r][h]);
}

void score(const ScoreTile& tile) {
  for (int half = 0; half < 2; half += kHalves) {
    int row = 0;
    for (; row + kScoreRows <= tile.rows; row += kScoreRows) score_rows<kScoreRows>(tile, row, half);
    for (; row < tile.rows; ++row) score_rows<1>(tile, row, half);
  }
}

inline float length_of(const float* x, std::int64_t size) {
  Lanes squares = zero();
  for (std::int64_t i = 0; i < size; i += 16) {
    const Lanes here = some<Float32>(x, i, size - i);
    squares = multiply_add(here, here, squares);
  }
  return __builtin_sqrtf(sum(squares));
}

void pack(const float* x, std::int64_t size, int tokens, float* packed, float* length) {
  for (std::int64_t channel = 0; channel < size; ++channel)
    for (int token = tokens; token < kTokens; ++token) packed[channel * kTokens + token] = 0.0f;
  for (int token = 0; token < tokens; ++token) {
    const float* from = x + token * size;
    for (std::int64_t channel = 0; channel < size; ++channel) packed[channel * kTokens + token] = from[channel];
    length[token] = length_of(from, size);
  }
}

inline std::uint16_t rounded(float value) {
  const std::uint32_t bits = bits_of(value);
  if (is_nan(bits)) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Rounds `size` numbers, fills up with zeros, and returns length and rounding error.
struct Rounding {
  float length, error;
};
inline Rounding round_row(const float* x, std::int64_t size, std::int64_t padded, std::uint16_t* target) {
  for (std::int64_t i = 0; i < size; ++i) target[i] = rounded(x[i]);
  for (std::int64_t i = size; i < padded; ++i) target[i] = 0;
  Lanes lengths = zero(), errors = zero();
  for (std::int64_t i = 0; i < size; i += 16) {
    const Lanes exact = some<Float32>(x, i, size - i), there = some<BFloat16>(target, i, size - i);
    const Lanes wrong = subtract(exact, there);
    lengths = multiply_add(exact, exact, lengths);
    errors = multiply_add(wrong, wrong, errors);
  }
  return {__builtin_sqrtf(sum(lengths)), __builtin_sqrtf(sum(errors))};
}

void pack_bfloat16(const float* x, std::int64_t size, std::int64_t padded, int tokens, std::uint16_t* packed,
                   std::uint16_t* row, float* length, float* error) {
  auto* pairs = reinterpret_cast<std::uint32_t*>(packed);
  for (int token = 0; token < kTokens; ++token) {
    std::uint32_t* to = pairs + token / 16 * (padded / 2) * 16 + token % 16;
    if (token >= tokens) {
      for (std::int64_t pair = 0; pair < padded / 2; ++pair) to[pair * 16] = 0;
      continue;
    }
    const Rounding found = round_row(x + token * size, size, padded, row);
    length[token] = found.length;
    error[token] = found.error;
    for (std::int64_t pair = 0; pair < padded / 2; ++pair)
      __builtin_memcpy(to + pair * 16, row + 2 * pair, sizeof(std::uint32_t));
  }
}

inline float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }

void round_rows(const Dictionary& dictionary, std::int64_t first, std::int64_t last, std::int64_t padded,
                std::uint16_t* target, float* lengths, float* errors) {
  const std::int64_t size = dictionary.size;
  for (std::int64_t block = first; block < last; block += kMarginRows) {
    float longest = 0.0f, error = 0.0f;
    for (std::int64_t row = block; row < last && row < block + kMarginRows; ++row) {
      const Rounding found = round_row(static_cast<const float*>(dictionary.data) + row * size, size, padded,
                                       target + row * padded);
      longest = larger_or_nan(found.length, longest);
      error = larger_or_nan(found.error, error);
    }
    lengths[block / kMarginRows] = longest;
    errors[block / kMarginRows] = error;
  }
}

void lengths(const Dictionary& dictionary, std::int64_t first, std::int64_t last, float* found) {
  for (std::int64_t block = first; block < last; block += kMarginRows) {
    float longest = 0.0f;
    for (std::int64_t row = block; row < last && row < block + kMarginRows; ++row)
      longest = larger_or_nan(length_of(static_cast<const float*>(dictionary.data) + row * dictionary.size,
                                        dictionary.size), longest);
    found[block / kMarginRows] = longest;
  }
}
