// Attention of few queries over listed tokens, and the choice of tokens by a few channels of their keys.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library. All of it waits for memory, so that what will be read is asked for beforehand.

#include "attention_tokens.hpp"

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#include "attention_lanes.hpp"

#include "attention_vectors.hpp"

#if defined(__AVX512F__)
constexpr int kTogether = 4, kSums = 16;  // rows for which a key is decoded once, and sums of values in registers
#else
constexpr int kTogether = 2, kSums = 4;
#endif

constexpr std::int64_t kSoon = 16;  // tokens ahead of which keys are asked for, no more than kTokens

template <int Value>
struct Count {
  static constexpr int value = Value;
};

template <typename Body>
inline void in_rows(std::int64_t count, Body&& body) {
  std::int64_t row = 0;
  for (; row + kTogether <= count; row += kTogether) body(row, Count<kTogether>{});
  if constexpr (kTogether > 2)
    for (; row + 2 <= count; row += 2) body(row, Count<2>{});
  for (; row < count; ++row) body(row, Count<1>{});
}

template <typename Stored>
inline const char* vector_at(const Vectors& from, std::int64_t vector) {
  return static_cast<const char*>(from.data) + vector * from.stride * (kBits<Stored> / 8);
}

// Vectors are asked for one by one between computations: a burst of requests fills the queue of a core, and what comes
// behind waits.
template <typename Stored>
inline void ask_for(const Vectors& from, std::int64_t vector) {
  const char* there = vector_at<Stored>(from, vector);
  for (std::int64_t byte = 0; byte < from.size * (kBits<Stored> / 8); byte += 64) __builtin_prefetch(there + byte);
}

// Scores of some rows with some tokens, not yet summed over lanes: one sum after the other would wait for itself, so that
// those of several tokens take turns. With the first rows, the values of these tokens are asked for, and the keys that
// come later.
template <typename Stored, int Rows, int Tokens>
inline void score_together(const TokenTile& tile, std::int64_t row, std::int64_t first, Lanes (*sums)[16],
                           int at) {
  const std::int64_t size = tile.keys.size, padded = (size + 15) / 16 * 16;
  const float* query = tile.rows + row * padded;
  std::int64_t tokens[Tokens];
  const char* keys[Tokens];
  Lanes some[Tokens][Rows];
  for (int t = 0; t < Tokens; ++t) {
    tokens[t] = tile.tokens[first + t];
    keys[t] = vector_at<Stored>(tile.keys, tokens[t]);
    for (int r = 0; r < Rows; ++r) some[t][r] = zero();
    if (row != 0) continue;
    if (first + t + kSoon < tile.end) ask_for<Stored>(tile.keys, tile.tokens[first + t + kSoon]);
    ask_for<Stored>(tile.values, tokens[t]);
  }
  std::int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    Lanes queries[Rows];
    for (int r = 0; r < Rows; ++r) queries[r] = load(query + r * padded + i);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Lanes channels = Stored::all(keys[t], i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) some[t][r] = multiply_add(queries[r], channels, some[t][r]);
    }
  }
  if (i < size)
    for (int t = 0; t < Tokens; ++t) {
      const Lanes channels = sixteen<Stored>(tile.keys, tokens[t], i);
      for (int r = 0; r < Rows; ++r) some[t][r] = multiply_add(load(query + r * padded + i), channels, some[t][r]);
    }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) sums[r][at + t] = some[t][r];
}

// Scores of some rows with at most sixteen tokens, sixteen of which are stored for each row.
template <typename Stored, int Rows>
inline void score_sixteen(const TokenTile& tile, std::int64_t row, std::int64_t first, int count, float* scores) {
  constexpr int kChains = 2 * kTogether / Rows;
  Lanes sums[Rows][16];
  int t = 0;
  for (; t + kChains <= count; t += kChains) score_together<Stored, Rows, kChains>(tile, row, first + t, sums, t);
  for (; t < count; ++t) score_together<Stored, Rows, 1>(tile, row, first + t, sums, t);
  for (; t < 16; ++t)
    for (int r = 0; r < Rows; ++r) sums[r][t] = zero();
  for (int r = 0; r < Rows; ++r) {
    transpose(sums[r]);
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; ++i) sums[r][i] = add(sums[r][i], sums[r][i + width]);
    store(scores + (row + r) * kTokens, sums[r][0]);
  }
}

// outputs[row] = outputs[row] · shares[row] + Σ weights · values, for some rows and registers of a value
template <typename Stored, int Rows, int Strips>
inline void add_values(const TokenTile& tile, std::int64_t row, std::int64_t strip, std::int64_t first, int count,
                       const float* shares) {
  const std::int64_t strips = (tile.values.size + 15) / 16;
  Lanes sums[Rows][Strips];
  for (int r = 0; r < Rows; ++r)
    for (int s = 0; s < Strips; ++s)
      sums[r][s] = multiply(load(tile.outputs + ((row + r) * strips + strip + s) * 16), spread(shares[row + r]));
  const bool inside = (strip + Strips) * 16 <= tile.values.size;
  for (int t = 0; t < count; ++t) {
    const std::int64_t token = tile.tokens[first + t];
    const char* value = vector_at<Stored>(tile.values, token);
    Lanes channels[Strips];
#pragma GCC unroll 8
    for (int s = 0; s < Strips; ++s)
      channels[s] = inside ? Stored::all(value, 16 * (strip + s))
                           : sixteen<Stored>(tile.values, token, 16 * (strip + s));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Lanes weight = spread(tile.scores[(row + r) * kTokens + t]);
#pragma GCC unroll 8
      for (int s = 0; s < Strips; ++s) sums[r][s] = multiply_add(weight, channels[s], sums[r][s]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int s = 0; s < Strips; ++s) store(tile.outputs + ((row + r) * strips + strip + s) * 16, sums[r][s]);
}

template <typename Stored>
void gather_tokens(const TokenTile& tile) {
  const std::int64_t strips = (tile.values.size + 15) / 16;
  __builtin_memset(tile.outputs, 0, sizeof(float) * static_cast<std::size_t>(tile.count * strips * 16));
  for (std::int64_t row = 0; row < tile.count; ++row) tile.most[row] = negative_infinity(), tile.total[row] = 0.0f;
  for (std::int64_t t = tile.first; t < tile.last && t < tile.first + kSoon; ++t)
    ask_for<Stored>(tile.keys, tile.tokens[t]);
  for (std::int64_t first = tile.first; first < tile.last; first += kTokens) {
    const int count = static_cast<int>(tile.last - first < kTokens ? tile.last - first : kTokens);
    for (int begin = 0; begin < count; begin += 16) {
      const int some = count - begin < 16 ? count - begin : 16;
      in_rows(tile.count, [&](std::int64_t row, auto rows) {
        score_sixteen<Stored, decltype(rows)::value>(tile, row, first + begin, some, tile.scores + begin);
      });
    }
    float shares[kTileRows];
    const int words = (count + 15) / 16;
    for (std::int64_t row = 0; row < tile.count; ++row) {
      float* scores = tile.scores + row * kTokens;
      if (count % 16)
        store(scores + 16 * (words - 1), choose((1u << count % 16) - 1u, load(scores + 16 * (words - 1)),
                                                negative_infinity()));
      Lanes high = spread(negative_infinity());
      for (int k = 0; k < words; ++k) high = larger(load(scores + 16 * k), high);
      const float before = tile.most[row], found = largest(high), most = found > before ? found : before;
      const float shift = most == negative_infinity() ? 0.0f : most;
      Lanes total = zero();
      for (int k = 0; k < words; ++k) {
        const Lanes weight = power_of_two(subtract(load(scores + 16 * k), spread(shift)));
        store(scores + 16 * k, weight);
        total = add(total, weight);
      }
      shares[row] = power_of_two(before - shift);
      tile.total[row] = tile.total[row] * shares[row] + sum(total);
      tile.most[row] = most;
    }
    in_rows(tile.count, [&](std::int64_t row, auto rows) {
      constexpr int kSome = decltype(rows)::value, kStrips = kSums / kSome < 8 ? kSums / kSome : 8;
      std::int64_t strip = 0;
      for (; strip + kStrips <= strips; strip += kStrips)
        add_values<Stored, kSome, kStrips>(tile, row, strip, first, count, shares);
      if constexpr (kStrips > 4)
        for (; strip + 4 <= strips; strip += 4) add_values<Stored, kSome, 4>(tile, row, strip, first, count, shares);
      for (; strip < strips; ++strip) add_values<Stored, kSome, 1>(tile, row, strip, first, count, shares);
    });
  }
}

void gather(const TokenTile& tile) {
  if (tile.keys.value == Value::float32) gather_tokens<Float32>(tile);
  else gather_tokens<BFloat16>(tile);
}

// ------------------------------------------------------------------------------------------------ which tokens

template <typename Stored>
inline float score_one(const Vectors& labels, const float* query, std::int64_t token) {
  float total = 0.0f;
  for (std::int64_t i = 0; i < labels.size; ++i) {
    const std::int64_t at = token * labels.stride + i;
    float channel;
    if constexpr (kBits<Stored> == 32) channel = static_cast<const float*>(labels.data)[at];
    else channel = as_float(std::uint32_t{static_cast<const std::uint16_t*>(labels.data)[at]} << 16);
    total += query[i] * channel;
  }
  return total;
}

#if defined(__AVX512F__)
// Sixteen tokens, of which a register holds one channel, or two adjacent ones of bfloat16.
template <typename Stored>
inline void score_lanes(const Vectors& labels, const float* query, std::int64_t token, float* scores) {
  constexpr int kPer = 32 / kBits<Stored>;
  const auto* from = static_cast<const char*>(labels.data) + token * labels.stride * (kBits<Stored> / 8);
  const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(static_cast<int>(labels.stride * (kBits<Stored> / 8))));
  __m512 total = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < labels.size; i += kPer) {
    const __m512i words = _mm512_i32gather_epi32(places, from + i * (kBits<Stored> / 8), 1);
    if constexpr (kPer == 1) {
      total = _mm512_fmadd_ps(_mm512_castsi512_ps(words), _mm512_set1_ps(query[i]), total);
    } else {
      const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(words, upper));
      total = _mm512_fmadd_ps(low, _mm512_set1_ps(query[i]), total);
      total = _mm512_fmadd_ps(high, _mm512_set1_ps(query[i + 1]), total);
    }
  }
  _mm512_storeu_ps(scores, total);
}


// Per quarter of a register: sums of adjacent lanes, first of a, then of b.
inline __m512 pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
// Sums of adjacent quarters, first of a, then of b.
inline __m512 quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Sixteen tokens of 4, 8 or 16 labels that lie one after the other; `query` is repeated to fill sixteen lanes.
template <typename Stored, int Size>
inline void score_adjacent(const void* labels, __m512 query, float* scores) {
  __m512 all[Size], fours[Size / 4];
  for (int j = 0; j < Size; ++j) all[j] = _mm512_mul_ps(Stored::all(labels, 16 * j).r, query);
  for (int j = 0; j < Size / 4; ++j)  // in lane k of a quarter the sum of that quarter of register 4 j + k
    fours[j] = pairs(pairs(all[4 * j], all[4 * j + 1]), pairs(all[4 * j + 2], all[4 * j + 3]));
  if constexpr (Size == 16) {
    _mm512_storeu_ps(scores, quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3])));
  } else if constexpr (Size == 8) {
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm512_storeu_ps(scores, _mm512_permutexvar_ps(order, quarters(fours[0], fours[1])));
  } else {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_ps(scores, _mm512_permutexvar_ps(order, fours[0]));
  }
}

template <typename Stored, int Size>
inline std::int64_t score_all_adjacent(const Vectors& labels, const float* query, std::int64_t first,
                                       std::int64_t last, float* scores) {
  alignas(64) float repeated[16];
  for (int i = 0; i < 16; ++i) repeated[i] = query[i % Size];
  const __m512 queries = _mm512_load_ps(repeated);
  constexpr std::int64_t kBytes = Size * kBits<Stored> / 8;  // of a token
  for (; first + 16 <= last; first += 16, scores += 16) {
    const char* there = static_cast<const char*>(labels.data) + first * kBytes;
    for (std::int64_t byte = 0; byte < 16 * kBytes; byte += 64) fetch(there, byte + 2 * kAhead);
    score_adjacent<Stored, Size>(there, queries, scores);
  }
  return first;
}
#endif

template <typename Stored>
void score_labels(const Vectors& labels, const float* query, std::int64_t first, std::int64_t last, float* scores) {
  std::int64_t token = first;
#if defined(__AVX512F__)
  if (labels.stride == labels.size) {
    if (labels.size == 4) token = score_all_adjacent<Stored, 4>(labels, query, first, last, scores);
    if (labels.size == 8) token = score_all_adjacent<Stored, 8>(labels, query, first, last, scores);
    if (labels.size == 16) token = score_all_adjacent<Stored, 16>(labels, query, first, last, scores);
  }
  if (labels.size % (32 / kBits<Stored>) == 0)
    for (; token + 16 <= last; token += 16) {
      const std::int64_t bytes = labels.stride * (kBits<Stored> / 8);
      for (std::int64_t byte = 0; byte < 16 * bytes; byte += 64)
        fetch(static_cast<const char*>(labels.data) + token * bytes, byte + 2 * kAhead);
      score_lanes<Stored>(labels, query, token, scores + token - first);
    }
#endif
  for (; token < last; ++token) scores[token - first] = score_one<Stored>(labels, query, token);
}

void score(const Vectors& labels, const float* query, std::int64_t first, std::int64_t last, float* scores) {
  if (labels.value == Value::float32) score_labels<Float32>(labels, query, first, last, scores);
  else score_labels<BFloat16>(labels, query, first, last, scores);
}

inline float number_at(const Vectors& vectors, std::int64_t place) {
  const std::int64_t at = place * vectors.stride;
  if (vectors.value == Value::float32) return static_cast<const float*>(vectors.data)[at];
  return as_float(std::uint32_t{static_cast<const std::uint16_t*>(vectors.data)[at]} << 16);
}

template <int Bits>
inline float score_rounded_one(const RoundedLabels& labels, const float* query, float all, std::int64_t token) {
  const std::uint8_t* codes = labels.codes + token * labels.stride;
  float total = 0.0f;
  for (std::int64_t i = 0; i < labels.size; ++i) {
    const int code = Bits == 8 ? codes[i] : codes[i / 2] >> 4 * (i % 2) & 15;
    total += query[i] * static_cast<float>(code);
  }
  return total * number_at(labels.step, token) + all * number_at(labels.low, token);
}

#if defined(__AVX512F__)
inline __m512 sixteen_numbers(const Vectors& vectors, std::int64_t first) {
  if (vectors.value == Value::float32)
    return _mm512_loadu_ps(static_cast<const float*>(vectors.data) + first * vectors.stride);
  const auto* from = static_cast<const std::uint16_t*>(vectors.data) + first;
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// Sixteen tokens, of whose codes a register holds four bytes each.
template <int Bits>
inline __m512 score_rounded_lanes(const RoundedLabels& labels, const float* query, const __m512* products,
                                  __m512i places, std::int64_t token) {
  constexpr int kPer = 32 / Bits;
  const std::uint8_t* from = labels.codes + token * labels.stride;
  __m512 total = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < labels.size; i += kPer, from += 4) {
    __m512i words = labels.stride == 4 ? _mm512_loadu_si512(from) : _mm512_i32gather_epi32(places, from, 1);
    const std::int64_t some = labels.size - i < kPer ? labels.size - i : kPer;
    for (std::int64_t j = 0; j < some; ++j, words = _mm512_srli_epi32(words, Bits)) {
      if constexpr (Bits == 4) {  // only the lowest four bits choose among sixteen products
        total = _mm512_add_ps(total, _mm512_permutexvar_ps(words, products[i + j]));
      } else {
        const __m512 codes = _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(255)));
        total = _mm512_fmadd_ps(codes, _mm512_set1_ps(query[i + j]), total);
      }
    }
  }
  return total;
}
#endif

constexpr std::int64_t kMostRounded = 64;  // labels whose products with all codes of four bits are kept

template <int Bits>
void score_some_rounded(const RoundedLabels& labels, const float* query, std::int64_t first, std::int64_t last,
                        float* scores) {
  float all = 0.0f;
  for (std::int64_t i = 0; i < labels.size; ++i) all += query[i];
  std::int64_t token = first;
#if defined(__AVX512F__)
  __m512 products[Bits == 4 ? kMostRounded : 1];
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (Bits == 4)
    for (std::int64_t i = 0; i < labels.size && i < kMostRounded; ++i)
      products[i] = _mm512_mul_ps(_mm512_set1_ps(query[i]), _mm512_cvtepi32_ps(lanes));
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(labels.stride)));
  const bool dense = labels.low.stride == 1 && labels.step.stride == 1 && (Bits == 8 || labels.size <= kMostRounded);
  // a word may reach three bytes beyond a token, which must be those of others
  for (; dense && token + 16 <= last && token + 19 <= labels.count; token += 16) {
    for (std::int64_t byte = 0; byte < 16 * labels.stride; byte += 64)
      fetch(labels.codes + token * labels.stride, byte + 2 * kAhead);
    const __m512 total = score_rounded_lanes<Bits>(labels, query, products, places, token);
    const __m512 offset = _mm512_mul_ps(sixteen_numbers(labels.low, token), _mm512_set1_ps(all));
    _mm512_storeu_ps(scores + token - first, _mm512_fmadd_ps(total, sixteen_numbers(labels.step, token), offset));
  }
#endif
  for (; token < last; ++token) scores[token - first] = score_rounded_one<Bits>(labels, query, all, token);
}

void score_rounded(const RoundedLabels& labels, const float* query, std::int64_t first, std::int64_t last,
                   float* scores) {
  if (labels.bits == 4) score_some_rounded<4>(labels, query, first, last, scores);
  else score_some_rounded<8>(labels, query, first, last, scores);
}

#include "token_choice.hpp"

}  // namespace

const TokenKernels& token_table() {
  static const TokenKernels kernels = {gather, score, score_rounded, choose_highest};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
