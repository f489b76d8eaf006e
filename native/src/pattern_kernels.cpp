// Products with matrices that keep n of every m adjacent weights of a row: PatternRows.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.
//
// The lanes are sixteen rows, which all meet the same m inputs at the same time. So these lie in one or two registers,
// and every lane picks the one that it needs with a single permutation: the processor looks at no more bits of an index
// than there are inputs to choose from, so that a word of places only has to be shifted. A kept weight costs the same
// whatever n and m are, and zeros cost nothing.

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#if defined(__AVX2__)
constexpr int kUnrolled = 16, kVectors = 4;  // places at a time, vectors for which a weight is decoded once
#else
constexpr int kUnrolled = 1, kVectors = 1;  // lanes are loops themselves, and the compiler would be at it for minutes
#endif

// Sixteen words of places, of which the lowest place is the next one. A word that is picked with may hold more above.
struct Places;

#if defined(__AVX512F__)

struct Places {
  __m512i r;
};
static inline Places load_places(const std::uint32_t* words) { return {_mm512_loadu_si512(words)}; }
template <int Bits>
inline Places following(Places places) {
  return {_mm512_srli_epi32(places.r, Bits)};
}
// In each lane one of the M inputs from x on.
template <int M>
inline Lanes pick(const float* x, Places places) {
  if constexpr (M == 2) {
    double pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return {_mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(pair)), places.r)};
  } else if constexpr (M == 4) {
    return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), places.r)};
  } else if constexpr (M == 8) {
    return {_mm512_permutexvar_ps(places.r, _mm512_broadcast_f32x8(_mm256_loadu_ps(x)))};
  } else if constexpr (M == 16) {
    return {_mm512_permutexvar_ps(places.r, _mm512_loadu_ps(x))};
  } else {
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(x), places.r, _mm512_loadu_ps(x + 16))};
  }
}

#elif defined(__AVX2__)

struct Places {
  __m256i r[2];
};
static inline Places load_places(const std::uint32_t* words) {
  const auto* there = reinterpret_cast<const __m256i*>(words);
  return {{_mm256_loadu_si256(there), _mm256_loadu_si256(there + 1)}};
}
template <int Bits>
inline Places following(Places places) {
  return {{_mm256_srli_epi32(places.r[0], Bits), _mm256_srli_epi32(places.r[1], Bits)}};
}
template <int M>
inline __m256 pick_eight(const float* x, __m256i places) {
  if constexpr (M == 2) {
    double pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)), places);
  } else if constexpr (M == 4) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)), places);
  } else if constexpr (M == 8) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), places);
  } else {  // the highest bit of a place says which half it is in
    const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(places, M == 16 ? 28 : 27));
    return _mm256_blendv_ps(pick_eight<M / 2>(x, places), pick_eight<M / 2>(x + M / 2, places), high);
  }
}
template <int M>
inline Lanes pick(const float* x, Places places) {
  return {{pick_eight<M>(x, places.r[0]), pick_eight<M>(x, places.r[1])}};
}

#else

struct Places {
  std::uint32_t r[16];
};
static inline Places load_places(const std::uint32_t* words) {
  Places places;
  __builtin_memcpy(places.r, words, sizeof places.r);
  return places;
}
template <int Bits>
inline Places following(Places places) {
  for (std::uint32_t& lane : places.r) lane >>= Bits;
  return places;
}
template <int M>
inline Lanes pick(const float* x, Places places) {
  Lanes found;
  for (int lane = 0; lane < 16; ++lane) found.r[lane] = x[places.r[lane] & (M - 1)];
  return found;
}

#endif

// Sums of one vector, so that additions need not wait for each other.
constexpr int ways(int count) {
#if defined(__AVX512F__)
  return count <= 2 ? 4 : count <= 4 ? 2 : 1;
#else
  return count == 1 ? 4 : count == 2 ? 2 : 1;
#endif
}

// One panel against `Count` vectors.
template <typename Value, int M, int Count>
inline void multiply_panel(const PatternRows& matrix, std::int64_t panel, const float* inputs, std::int64_t stride,
                           Lanes* totals) {
  constexpr int kPlaces = places_of_word(M), kWays = ways(Count);
  constexpr int kSteps = 64 * 8 / (16 * kBits<Value>);  // that a line of the cache holds
  const std::int64_t groups = matrix.groups(), run = matrix.groups_of_run(), runs = matrix.runs();
  const std::uint32_t* words = matrix.places + panel * matrix.words_of_panel() * 16;
  std::int64_t next = panel * groups * matrix.n * 16;  // value
  for (int b = 0; b < Count; ++b) totals[b] = zero();
  for (std::int64_t number = 0; number < runs; ++number) {
    const std::int64_t begin = number * run, count = begin + run < groups ? run : groups - begin;
    Lanes sums[Count][kWays];
    for (auto& each : sums)
      for (Lanes& one : each) one = zero();
    for (int pass = 0; pass < matrix.n; ++pass) {
      const float* x = inputs + begin * M;
      std::int64_t left = count;
      const auto use = [&](Places places, int way) {
        const Lanes weights = Value::all(matrix.values, next);
        for (int b = 0; b < Count; ++b)
          sums[b][way] = multiply_add(weights, pick<M>(x + b * stride, places), sums[b][way]);
        next += 16;
        x += M;
      };
      for (; left >= kPlaces; left -= kPlaces) {
        Places places = load_places(words);
        fetch(words, kAhead);
        words += 16;
#pragma GCC unroll kUnrolled
        for (int t = 0; t < kPlaces; ++t) {
          if (t % kSteps == 0) fetch(matrix.values, next * kBits<Value> / 8 + kAhead);
          use(places, t % kWays);
          places = following<place_bits(M)>(places);
        }
      }
      if (left) {
        Places places = load_places(words);
        words += 16;
        for (; left; --left) {
          use(places, 0);
          places = following<place_bits(M)>(places);
        }
      }
    }
    for (int b = 0; b < Count; ++b) {
      for (int half = kWays / 2; half; half /= 2)
        for (int way = 0; way < half; ++way) sums[b][way] = add(sums[b][way], sums[b][way + half]);
      totals[b] = matrix.scales
                      ? multiply_add(sums[b][0], load(matrix.scales + (panel * runs + number) * 16), totals[b])
                      : sums[b][0];
    }
  }
}

template <typename Value, int M, int Count>
void multiply_rows(const PatternRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                   std::int64_t stride, float* outputs, std::int64_t output_stride) {
  for (std::int64_t panel = first / 16; panel * 16 < last; ++panel) {
    Lanes totals[Count];
    multiply_panel<Value, M, Count>(matrix, panel, inputs, stride, totals);
    const std::int64_t begin = panel * 16 < first ? first : panel * 16;
    const std::int64_t end = panel * 16 + 16 < last ? panel * 16 + 16 : last;
    for (int b = 0; b < Count; ++b) {
      float* there = outputs + b * output_stride;
      if (end - begin == 16) {
        store(there + begin, totals[b]);
        continue;
      }
      alignas(64) float found[16];
      store(found, totals[b]);
      const auto bytes = sizeof(float) * static_cast<std::size_t>(end - begin);
      __builtin_memcpy(there + begin, found + (begin - panel * 16), bytes);
    }
  }
}

// use(place of sixteen values, group, words, shift) for all that is stored for a panel: lane i is in column
// words[i] >> shift of the group, which may lie beyond the last.
template <typename Use>
inline void each_stored(const PatternRows& matrix, std::int64_t panel, Use&& use) {
  const int bits = place_bits(matrix.m), places = places_of_word(matrix.m);
  const std::int64_t groups = matrix.groups(), run = matrix.groups_of_run(), runs = matrix.runs();
  const std::uint32_t* words = matrix.places + panel * matrix.words_of_panel() * 16;
  std::int64_t next = panel * groups * matrix.n * 16;
  for (std::int64_t number = 0; number < runs; ++number) {
    const std::int64_t begin = number * run, count = begin + run < groups ? run : groups - begin;
    for (int pass = 0; pass < matrix.n; ++pass, words += matrix.words_of_pass(count) * 16)
      for (std::int64_t i = 0; i < count; ++i, next += 16)
        use(next, begin + i, words + i / places * 16, i % places * bits);
  }
}

// What a dense product makes of zeros that meet an infinite or NaN input.
void spread_what_is_not_finite(const PatternRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                               float* outputs) {
  std::int64_t all = 0;
  for (std::int64_t column = 0; column < matrix.columns; ++column) all += inputs[column] - inputs[column] != 0.0f;
  for (std::int64_t panel = first / 16; panel * 16 < last; ++panel) {
    const std::int64_t begin = panel * 16 < first ? first : panel * 16;
    const std::int64_t end = panel * 16 + 16 < last ? panel * 16 + 16 : last;
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t met = 0;  // those that meet a stored weight, be it zero
      each_stored(matrix, panel, [&](std::int64_t, std::int64_t group, const std::uint32_t* words, std::int64_t shift) {
        const float x = inputs[group * matrix.m + (words[row - panel * 16] >> shift & (matrix.m - 1))];
        met += x - x != 0.0f;
      });
      if (met < all) outputs[row] = as_float(0x7fc00000u);
    }
  }
}

template <typename Value>
void expand_rows(const PatternRows& matrix, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
  const std::int64_t run = matrix.groups_of_run(), runs = matrix.runs();
  for (std::int64_t row = first; row < last; ++row)
    __builtin_memset(target + (row - first) * stride, 0, sizeof(float) * static_cast<std::size_t>(matrix.columns));
  for (std::int64_t panel = first / 16; panel * 16 < last; ++panel) {
    const int begin = panel * 16 < first ? static_cast<int>(first - panel * 16) : 0;
    const int end = panel * 16 + 16 < last ? 16 : static_cast<int>(last - panel * 16);
    float* lines = target + (panel * 16 - first) * stride;
    const auto spread_out = [&](std::int64_t next, std::int64_t group, const std::uint32_t* words, std::int64_t shift) {
      alignas(64) float weights[16];
      Lanes stored = Value::all(matrix.values, next);
      if (matrix.scales) stored = multiply(stored, load(matrix.scales + (panel * runs + group / run) * 16));
      store(weights, stored);
      for (int lane = begin; lane < end; ++lane) {
        const std::int64_t column = group * matrix.m + (words[lane] >> shift & (matrix.m - 1));
        if (column < matrix.columns) lines[lane * stride + column] = weights[lane];
      }
    };
    each_stored(matrix, panel, spread_out);
  }
}

// ------------------------------------------------------------------------------------------------ choosing

constexpr std::int64_t kNear = 1 << 18;  // bytes of values that stay in a near cache while all vectors meet them

template <typename Value, int M>
void multiply_of(const PatternRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs,
                 const Outputs& outputs) {
  constexpr int kPair = kVectors < 2 ? kVectors : 2;
  const std::int64_t bytes = m.groups() * m.n * 16 * kBits<Value> / 8, panels = bytes < kNear ? kNear / (bytes + 1) : 1;
  for (std::int64_t begin = first; begin < last;) {
    const std::int64_t wanted = (begin / 16 + panels) * 16, end = wanted < last ? wanted : last;
    for (int b = 0; b < inputs.count;) {
      const float* x = inputs.data + b * inputs.stride;
      float* y = outputs.data + b * outputs.stride;
      const int left = inputs.count - b, taken = left >= kVectors ? kVectors : left >= kPair ? kPair : 1;
      if (taken == 1) multiply_rows<Value, M, 1>(m, begin, end, x, inputs.stride, y, outputs.stride);
      else if (taken == kVectors) multiply_rows<Value, M, kVectors>(m, begin, end, x, inputs.stride, y, outputs.stride);
      else multiply_rows<Value, M, kPair>(m, begin, end, x, inputs.stride, y, outputs.stride);
      b += taken;
    }
    begin = end;
  }
  for (int b = 0; b < inputs.count; ++b) {
    const float* x = inputs.data + b * inputs.stride;
    if (!all_finite(x, m.columns)) spread_what_is_not_finite(m, first, last, x, outputs.data + b * outputs.stride);
  }
}

template <typename Value>
void multiply_values(const PatternRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs,
                     const Outputs& outputs) {
  switch (m.m) {
    case 2: return multiply_of<Value, 2>(m, first, last, inputs, outputs);
    case 4: return multiply_of<Value, 4>(m, first, last, inputs, outputs);
    case 8: return multiply_of<Value, 8>(m, first, last, inputs, outputs);
    case 16: return multiply_of<Value, 16>(m, first, last, inputs, outputs);
    default: return multiply_of<Value, 32>(m, first, last, inputs, outputs);
  }
}

void multiply_pattern(const PatternRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs,
                      const Outputs& outputs) {
  switch (m.value) {
    case Value::bfloat16: return multiply_values<BFloat16>(m, first, last, inputs, outputs);
    case Value::int8: return multiply_values<Int8>(m, first, last, inputs, outputs);
    default: return multiply_values<Float32>(m, first, last, inputs, outputs);
  }
}

void expand_pattern(const PatternRows& m, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
  switch (m.value) {
    case Value::bfloat16: return expand_rows<BFloat16>(m, first, last, target, stride);
    case Value::int8: return expand_rows<Int8>(m, first, last, target, stride);
    default: return expand_rows<Float32>(m, first, last, target, stride);
  }
}

}  // namespace

const PatternKernels& pattern_table() {
  static const PatternKernels kernels = {multiply_pattern, expand_pattern};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
