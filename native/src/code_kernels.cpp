// Products with rows that hold few features each, and the choice of those features.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.

#include "codes.hpp"

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#include "code_lanes.hpp"

#include "code_choice.hpp"
#include "code_scores.hpp"

#if defined(__AVX512F__)
constexpr int kStrip = 10;  // registers of sums, of an output that is longer
#else
constexpr int kStrip = 4;
#endif

template <typename Stored>
inline const char* row_of(const Dictionary& dictionary, std::int64_t row) {
  return static_cast<const char*>(dictionary.data) + row * dictionary.size * (kBits<Stored> / 8);
}

inline void ask_for(const char* there, std::int64_t bytes) {
  for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(there + byte, 0, 2);
}

// ------------------------------------------------------------------------------------------------ gathering

template <typename Stored, int Strip>
inline void gather_strip(const Listed& codes, const Dictionary& dictionary, std::int64_t begin, std::int64_t end,
                         std::int64_t column, float* output) {
  Lanes sums[Strip];
  for (Lanes& sum : sums) sum = zero();
  const std::int64_t left = dictionary.size - column;
  for (std::int64_t i = begin; i < end; ++i) {
    const char* row = row_of<Stored>(dictionary, codes.indices[i]);
    const Lanes value = spread(codes.values[i]);
    for (int s = 0; s < Strip; ++s)
      sums[s] = multiply_add(value, some<Stored>(row, column + 16 * s, left - 16 * s), sums[s]);
  }
  for (int s = 0; s < Strip; ++s) store_some(output + column + 16 * s, sums[s], left - 16 * s);
}

template <typename Stored>
void gather_rows(const Listed& codes, const Dictionary& dictionary, std::int64_t first, std::int64_t last,
                 float* outputs) {
  const std::int64_t size = dictionary.size, bytes = size * (kBits<Stored> / 8);
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t begin = codes.starts[row], end = codes.starts[row + 1];
    if (row + 1 < last)  // the next row's, while this one's are summed
      for (std::int64_t i = end; i < codes.starts[row + 2] && i < end + 64; ++i)
        ask_for(row_of<Stored>(dictionary, codes.indices[i]), bytes);
    float* output = outputs + row * size;
    std::int64_t column = 0;
    for (; column + 16 * kStrip <= size; column += 16 * kStrip)
      gather_strip<Stored, kStrip>(codes, dictionary, begin, end, column, output);
    for (; column < size; column += 16) gather_strip<Stored, 1>(codes, dictionary, begin, end, column, output);
  }
}

void gather(const Listed& codes, const Dictionary& dictionary, std::int64_t first, std::int64_t last, float* outputs) {
  if (dictionary.value == Value::float32) gather_rows<Float32>(codes, dictionary, first, last, outputs);
  else gather_rows<BFloat16>(codes, dictionary, first, last, outputs);
}

// ------------------------------------------------------------------------------------------------ sampled products

// Sums in an order of their own, which depends on the size alone.
template <typename Stored>
inline float product(const char* row, const float* x, std::int64_t size) {
  Lanes sums[4] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 64 <= size; i += 64)
    for (int s = 0; s < 4; ++s) sums[s] = multiply_add(Stored::all(row, i + 16 * s), load(x + i + 16 * s), sums[s]);
  for (int s = 0; i < size; i += 16, ++s)
    sums[s] = multiply_add(some<Stored>(row, i, size - i), some<Float32>(x, i, size - i), sums[s]);
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <typename Stored>
void products_of(const Listed& codes, const Dictionary& dictionary, const float* rows, std::int64_t first,
                 std::int64_t last, float* found) {
  const std::int64_t size = dictionary.size, bytes = size * (kBits<Stored> / 8), stop = codes.starts[last];
  for (std::int64_t row = first; row < last; ++row)
    for (std::int64_t i = codes.starts[row]; i < codes.starts[row + 1]; ++i) {
      if (i + 6 < stop) ask_for(row_of<Stored>(dictionary, codes.indices[i + 6]), bytes);
      found[i] = product<Stored>(row_of<Stored>(dictionary, codes.indices[i]), rows + row * size, size);
    }
}

void products(const Listed& codes, const Dictionary& dictionary, const float* rows, std::int64_t first,
              std::int64_t last, float* found) {
  if (dictionary.value == Value::float32) products_of<Float32>(codes, dictionary, rows, first, last, found);
  else products_of<BFloat16>(codes, dictionary, rows, first, last, found);
}

template <typename Stored>
void exact_of(const Dictionary& dictionary, const float* x, const float* bias, const std::int32_t* features,
              std::int64_t count, float* scores) {
  const std::int64_t bytes = dictionary.size * (kBits<Stored> / 8);
  const auto feature = [&](std::int64_t i) { return features ? std::int64_t{features[i]} : i; };
  for (std::int64_t i = 0; i < count; ++i) {
    if (i + 6 < count) ask_for(row_of<Stored>(dictionary, feature(i + 6)), bytes);
    const float score = product<Stored>(row_of<Stored>(dictionary, feature(i)), x, dictionary.size);
    scores[i] = bias ? score + bias[feature(i)] : score;
  }
}

void exact(const Dictionary& dictionary, const float* x, const float* bias, const std::int32_t* features,
           std::int64_t count, float* scores) {
  if (dictionary.value == Value::float32) exact_of<Float32>(dictionary, x, bias, features, count, scores);
  else exact_of<BFloat16>(dictionary, x, bias, features, count, scores);
}

// ------------------------------------------------------------------------------------------------ Adam

// What is left of a gradient along a direction changes nothing but its length.
inline float along(const float* a, const float* b, std::int64_t size) {
  return product<Float32>(reinterpret_cast<const char*>(a), b, size);
}

void adam(const AdamRows& rows, std::int64_t first, std::int64_t last) {
  const std::int64_t size = rows.size;
  const float first_share = 1.0f - rows.first, second_share = 1.0f - rows.second;
  for (std::int64_t row = first; row < last; ++row) {
    float* weight = rows.weights + row * size;
    float* mean = rows.means + row * size;
    float* square = rows.squares + row * size;
    const float* gradient = rows.gradients + row * size;
    const float lengthwise = rows.unit ? along(gradient, weight, size) : 0.0f;
    for (std::int64_t i = 0; i < size; ++i) {
      const float g = gradient[i] - lengthwise * weight[i];
      const float m = mean[i] + first_share * (g - mean[i]), v = rows.second * square[i] + second_share * g * g;
      mean[i] = m;
      square[i] = v;
      weight[i] -= rows.rate * m / (__builtin_sqrtf(v) * rows.square_share + rows.epsilon);
    }
    if (!rows.unit) continue;
    const float length = __builtin_sqrtf(along(weight, weight, size));
    const float share = 1.0f / (length > 1e-12f ? length : 1e-12f);
    for (std::int64_t i = 0; i < size; ++i) weight[i] *= share;
  }
}

}  // namespace

const CodeKernels& code_table() {
  static const CodeKernels kernels = {gather, products, highest, kScoreRows, score, pack,    pack_bfloat16,
                                      round_rows, lengths, collect, sift, exact, adam};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
