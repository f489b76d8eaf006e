// Products of int8 weights with inputs in int8, compiled once for every instruction set, into the namespace
// GOSSAMER_ISA.
//
// A word of 64 columns becomes sixteen sums of four products each, which are exact. With them sixteen lanes of float32
// grow: lane += sum · scale of the inputs, rounded once. The words of a run of columns that share a scale of the weights
// take turns with two such sets of lanes, which are added in the end, multiplied by that scale and added to the lanes of
// the row, rounded once; and the lanes of a row are added in halves. The order is the same for every instruction set,
// and so are all results, bit for bit.

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"
#include "dots.hpp"

constexpr std::int64_t kFurther = 2048;  // bytes; the values of a word are few, so that the next are soon wanted
constexpr int kAtOnce = 4;               // words whose places are found before the first is multiplied

// a · b + c, rounded once
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__) || defined(__AVX2__)
  return multiply_add(a, b, c);
#else
  for (int i = 0; i < 16; ++i) c.r[i] = __builtin_fmaf(a.r[i], b.r[i], c.r[i]);
  return c;
#endif
}

// ------------------------------------------------------------------------------------------------ words of weights
//
// `Word` holds 64 weights as `dot` wants them. `Places` is what is known of a word of a bitmask from its bits alone.

#if defined(__AVX512VNNI__)

// Weights plus 128, as unsigned bytes: the instruction multiplies those by signed ones, and the sums begin at
// −128 · Σ codes instead of 0.
struct Word {
  __m512i r;
};

inline Word from_signed(__m512i weights) { return {_mm512_xor_si512(weights, _mm512_set1_epi8(-128))}; }

inline Word load_word(const std::int8_t* values) { return from_signed(_mm512_loadu_si512(values)); }

inline Lanes dot(Word word, const RoundedWord& inputs) {
  const __m512i sums = _mm512_load_si512(inputs.middles);
  return {_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(sums, word.r, _mm512_load_si512(inputs.codes)))};
}

inline void note_middles(RoundedWord& word) {
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), _mm512_load_si512(word.codes));
  _mm512_store_si512(word.middles, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
}

#if defined(__AVX512VBMI2__)

struct Places {
  std::uint64_t bits;
};

inline Places places_of(std::uint64_t bits) { return {bits}; }

inline Word place_word(const std::int8_t* values, Places places) {
  return from_signed(_mm512_maskz_expand_epi8(_cvtu64_mask64(places.bits), _mm512_loadu_si512(values)));
}

#else

// No instruction moves bytes to where bits are. So sixteen columns find their values among sixteen bytes that are read
// where these begin: a column that is kept takes the byte whose number is that of the kept columns before it.
struct Places {
  std::uint64_t bits;
  __m512i counts;
};

// A product with 0x0101… adds up the bits of eight columns and those before. It takes long, so that it should begin
// early. The counts of sixteen columns begin at 15, which is −1 where only four bits are looked at.
inline Places places_of(std::uint64_t bits) {
  const __m512i absent = _mm512_set4_epi32(0, 0, 0, 15);
  const __m512i present = _mm512_set4_epi32(0x01010101, 0x01010101, 0x01010101, 0x01010110);
  const __m512i ones = _mm512_mask_blend_epi8(_cvtu64_mask64(bits), absent, present);
  return {bits, _mm512_mullo_epi64(ones, _mm512_set1_epi64(0x0101010101010101))};
}

inline Word place_word(const std::int8_t* values, Places places) {
  const __m512i eighth = _mm512_set4_epi32(0x07070707, 0x07070707, -1, -1);  // its count is added to the next eight
  const __m512i from = _mm512_add_epi8(places.counts, _mm512_shuffle_epi8(places.counts, eighth));
  const auto sixteen = [&](int before) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + before));
  };
  __m512i found = _mm512_broadcast_i32x4(sixteen(0));
  found = _mm512_mask_broadcast_i32x4(found, 0x00f0, sixteen(__builtin_popcount(places.bits & 0xffffu)));
  found = _mm512_mask_broadcast_i32x4(found, 0x0f00, sixteen(__builtin_popcount(places.bits & 0xffffffffu)));
  found = _mm512_mask_broadcast_i32x4(found, 0xf000, sixteen(__builtin_popcountll(places.bits & 0xffffffffffffu)));
  return from_signed(_mm512_maskz_shuffle_epi8(_cvtu64_mask64(places.bits), found, from));
}

#endif

#elif defined(__AVX2__)

struct Word {
  __m256i r[2];
};

inline Word load_word(const std::int8_t* values) {
  const auto* there = reinterpret_cast<const __m256i*>(values);
  return {{_mm256_loadu_si256(there), _mm256_loadu_si256(there + 1)}};
}

inline Lanes dot(Word word, const RoundedWord& inputs) {
  const Word codes = load_word(inputs.codes);
  Sums sums;
  for (int half = 0; half < 2; ++half) {  // 2 · 128 · 127 fits into 16 bits
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(word.r[half]), _mm256_sign_epi8(codes.r[half], word.r[half]));
    sums.r[half] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  return to_float(sums);
}

inline void note_middles(RoundedWord&) {}

struct Places {
  std::uint64_t bits;
};

inline Places places_of(std::uint64_t bits) { return {bits}; }

inline Word place_word(const std::int8_t* values, Places places) {
  alignas(32) std::uint64_t eights[8];
  for (int k = 0; k < 8; ++k) {
    const std::uint64_t held = _pdep_u64(places.bits >> 8 * k, 0x0101010101010101u) * 255u;
    std::uint64_t next;
    __builtin_memcpy(&next, values + __builtin_popcountll(places.bits & ((1ull << 8 * k) - 1)), 8);
    eights[k] = _pdep_u64(next, held);
  }
  return load_word(reinterpret_cast<const std::int8_t*>(eights));
}

#else

struct Word {
  std::int8_t r[64];
};

inline Word load_word(const std::int8_t* values) {
  Word word;
  __builtin_memcpy(word.r, values, sizeof word.r);
  return word;
}

inline Lanes dot(const Word& word, const RoundedWord& inputs) {
  Lanes found;
  for (int lane = 0; lane < 16; ++lane) {
    std::int32_t sum = 0;
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum += static_cast<std::int32_t>(word.r[i]) * inputs.codes[i];
    found.r[lane] = static_cast<float>(sum);
  }
  return found;
}

inline void note_middles(RoundedWord&) {}

struct Places {
  std::uint64_t bits;
};

inline Places places_of(std::uint64_t bits) { return {bits}; }

inline Word place_word(const std::int8_t* values, Places places) {
  Word word = {};
  for (std::uint64_t bits = places.bits; bits; bits &= bits - 1) word.r[__builtin_ctzll(bits)] = *values++;
  return word;
}

#endif

// ------------------------------------------------------------------------------------------------ rows

void round_to_words(const float* inputs, std::int64_t words, RoundedWord* target) {
  for (std::int64_t word = 0; word < words; ++word) {
    for (int half = 0; half < 2; ++half) {
      const float scale = round_inputs(inputs + 64 * word + kRounded * half, target[word].codes + kRounded * half);
      for (int lane = 8 * half; lane < 8 * half + 8; ++lane) target[word].scales[lane] = scale;
    }
    note_middles(target[word]);
  }
}

// The inputs of columns `begin` … `begin` + 63, a multiple of four, as one word; those from `end` on are 0.
inline RoundedWord shifted(const RoundedWord* inputs, std::int64_t begin, std::int64_t end) {
  RoundedWord word = {};
  for (int lane = 0; lane < 16 && begin + 4 * lane < end; ++lane) {
    const std::int64_t column = begin + 4 * lane;
    const RoundedWord& from = inputs[column / 64];
    __builtin_memcpy(word.codes + 4 * lane, from.codes + column % 64, 4);
    word.scales[lane] = from.scales[column % 64 / 4];
  }
  note_middles(word);
  return word;
}

// Two sets of lanes for each vector of a batch, with which words take turns.
template <int Count>
struct Turns {
  Lanes sums[Count][2];

  Turns() {
    for (auto& pair : sums) pair[0] = pair[1] = zero();
  }

  void add_word(const Word& weights, const RoundedWord* inputs, std::int64_t stride, int turn) {
    for (int b = 0; b < Count; ++b) {
      const RoundedWord& word = inputs[b * stride];
      sums[b][turn] = fused(dot(weights, word), load(word.scales), sums[b][turn]);
    }
  }

  void finish(Lanes* totals, const float* scale) const {
    for (int b = 0; b < Count; ++b) {
      const Lanes both = add(sums[b][0], sums[b][1]);
      totals[b] = scale ? fused(both, spread(*scale), totals[b]) : both;
    }
  }
};

template <int Count>
void integer_rows(const BitmaskRows& matrix, std::int64_t first, std::int64_t last, const RoundedWord* inputs,
                  std::int64_t stride, float* outputs, std::int64_t output_stride) {
  const std::int64_t words = (matrix.columns + 63) / 64;
  const std::int64_t run = matrix.scales ? matrix.group / 64 : words;
  const std::int64_t runs = matrix.scales ? (words + run - 1) / run : 1;
  for (std::int64_t row = first; row < last; ++row) {
    const std::uint64_t* bits = matrix.bits + row * words;
    const std::int8_t* next = static_cast<const std::int8_t*>(matrix.values) + matrix.starts[row];
    Lanes totals[Count];
    for (Lanes& total : totals) total = zero();
    for (std::int64_t number = 0; number < runs; ++number) {
      const std::int64_t end = number * run + run < words ? number * run + run : words;
      std::int64_t word = number * run;
      Turns<Count> turns;
      const auto take = [&](const Places& places, std::int64_t at, int turn) {
        turns.add_word(place_word(next, places), inputs + at, stride, turn);
        next += __builtin_popcountll(places.bits);
      };
      if (word + kAtOnce <= end) {
        Places ahead[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) ahead[k] = places_of(bits[word + k]);
        for (; word + 2 * kAtOnce <= end; word += kAtOnce) {
          fetch(next, kFurther);
          fetch(next, kFurther + 64);
          fetch(bits + word, kAhead);
#pragma GCC unroll 4
          for (int k = 0; k < kAtOnce; ++k) {
            take(ahead[k], word + k, k % 2);
            ahead[k] = places_of(bits[word + kAtOnce + k]);
          }
        }
#pragma GCC unroll 4
        for (int k = 0; k < kAtOnce; ++k) take(ahead[k], word + k, k % 2);
        word += kAtOnce;
      }
      for (int turn = 0; word < end; ++word, turn ^= 1) take(places_of(bits[word]), word, turn);
      turns.finish(totals, matrix.scales ? matrix.scales + row * runs + number : nullptr);
    }
    for (int b = 0; b < Count; ++b) outputs[b * output_stride + row] = sum(totals[b]);
  }
}

template <int Count>
void integer_rows(const DenseRows& matrix, std::int64_t first, std::int64_t last, const RoundedWord* inputs,
                  std::int64_t stride, float* outputs, std::int64_t output_stride) {
  const std::int64_t run = matrix.scales ? matrix.group : matrix.columns;
  const std::int64_t runs = matrix.scales ? (matrix.columns + run - 1) / run : 1;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int8_t* values = static_cast<const std::int8_t*>(matrix.values) + row * matrix.columns;
    Lanes totals[Count];
    for (Lanes& total : totals) total = zero();
    for (std::int64_t number = 0; number < runs; ++number) {
      // what the last word of a row holds of the next row meets codes of 0
      const bool ends = number + 1 == runs;
      const std::int64_t end = ends ? matrix.columns : number * run + run;
      std::int64_t column = number * run;
      Turns<Count> turns;
      const auto take = [&](int turn) {
        const Word weights = load_word(values + column + 64 * turn);
        fetch(values + column, kAhead + 64 * turn);
        turns.add_word(weights, inputs + column / 64 + turn, stride, turn);
      };
      if (column % 64 == 0) {
        for (; column + 128 <= end; column += 128) {
          take(0);
          take(1);
        }
      }
      for (int turn = 0; column < end; column += 64, turn ^= 1) {
        const Word weights = load_word(values + column);
        if (column % 64 == 0 && (ends || column + 64 <= end)) {
          turns.add_word(weights, inputs + column / 64, stride, turn);
          continue;
        }
        RoundedWord parts[Count];
        for (int b = 0; b < Count; ++b) parts[b] = shifted(inputs + b * stride, column, end);
        turns.add_word(weights, parts, 1, turn);
      }
      turns.finish(totals, matrix.scales ? matrix.scales + row * runs + number : nullptr);
    }
    for (int b = 0; b < Count; ++b) outputs[b * output_stride + row] = sum(totals[b]);
  }
}

// A matrix against vectors of a batch, four, two or one at a time.
template <typename Matrix>
void multiply(const Matrix& matrix, std::int64_t first, std::int64_t last, const RoundedInputs& inputs,
              const Outputs& outputs) {
  for (int b = 0; b < inputs.count;) {
    const RoundedWord* from = inputs.words + b * inputs.stride;
    float* to = outputs.data + b * outputs.stride;
    const int left = inputs.count - b, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (taken == 4) integer_rows<4>(matrix, first, last, from, inputs.stride, to, outputs.stride);
    else if (taken == 2) integer_rows<2>(matrix, first, last, from, inputs.stride, to, outputs.stride);
    else integer_rows<1>(matrix, first, last, from, inputs.stride, to, outputs.stride);
    b += taken;
  }
}

}  // namespace

const IntegerKernels& integer_table() {
  static const IntegerKernels kernels = {round_to_words, multiply<DenseRows>, multiply<BitmaskRows>};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
