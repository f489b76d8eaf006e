// Sums of products of small whole numbers, sixteen at a time, and inputs rounded to eight bits for them.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library. All of it is exact but the rounding, which is the same for every instruction set.

// Sixteen lanes of four unsigned bytes, and sixteen 32-bit sums.
struct Bytes;
struct Sums;

#if defined(__AVX512VNNI__)

struct Bytes {
  __m512i r;
};
struct Sums {
  __m512i r;
};
static inline Sums begin_sums(std::int32_t value) { return {_mm512_set1_epi32(value)}; }
static inline Bytes load_bytes(const std::uint32_t* source) { return {_mm512_loadu_si512(source)}; }
static inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.r, _mm512_set1_epi8(15))}; }
static inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm512_srli_epi16(a.r, 4)}); }
// each lane: sum += Σ of its four bytes times the four signed bytes of `inputs`; no byte of a lane is above 15
static inline Sums dot(Sums sums, Bytes a, std::uint32_t inputs) {
  return {_mm512_dpbusd_epi32(sums.r, a.r, _mm512_set1_epi32(static_cast<int>(inputs)))};
}
static inline Lanes to_float(Sums sums) { return {_mm512_cvtepi32_ps(sums.r)}; }

#elif defined(__AVX2__)

struct Bytes {
  __m256i r[2];
};
struct Sums {
  __m256i r[2];
};
static inline Sums begin_sums(std::int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
static inline Bytes load_bytes(const std::uint32_t* source) {
  const auto* there = reinterpret_cast<const __m256i*>(source);
  return {{_mm256_loadu_si256(there), _mm256_loadu_si256(there + 1)}};
}
static inline Bytes low_nibbles(Bytes a) {
  const __m256i low = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(a.r[0], low), _mm256_and_si256(a.r[1], low)}};
}
static inline Bytes high_nibbles(Bytes a) {
  return low_nibbles({{_mm256_srli_epi16(a.r[0], 4), _mm256_srli_epi16(a.r[1], 4)}});
}
static inline Sums dot(Sums sums, Bytes a, std::uint32_t inputs) {
  const __m256i four = _mm256_set1_epi32(static_cast<int>(inputs)), ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half)  // 2 · 15 · 127 fits into 16 bits
    sums.r[half] =
        _mm256_add_epi32(sums.r[half], _mm256_madd_epi16(_mm256_maddubs_epi16(a.r[half], four), ones));
  return sums;
}
static inline Lanes to_float(Sums sums) { return {{_mm256_cvtepi32_ps(sums.r[0]), _mm256_cvtepi32_ps(sums.r[1])}}; }

#else

struct Bytes {
  std::uint32_t r[16];
};
struct Sums {
  std::int32_t r[16];
};
static inline Sums begin_sums(std::int32_t value) {
  Sums sums;
  for (std::int32_t& lane : sums.r) lane = value;
  return sums;
}
static inline Bytes load_bytes(const std::uint32_t* source) {
  Bytes a;
  __builtin_memcpy(a.r, source, sizeof a.r);
  return a;
}
static inline Bytes low_nibbles(Bytes a) {
  for (std::uint32_t& lane : a.r) lane &= 0x0f0f0f0fu;
  return a;
}
static inline Bytes high_nibbles(Bytes a) {
  for (std::uint32_t& lane : a.r) lane = lane >> 4 & 0x0f0f0f0fu;
  return a;
}
static inline Sums dot(Sums sums, Bytes a, std::uint32_t inputs) {
  for (int lane = 0; lane < 16; ++lane)
    for (int byte = 0; byte < 4; ++byte)
      sums.r[lane] += static_cast<std::int32_t>(a.r[lane] >> 8 * byte & 255u) *
                      static_cast<std::int8_t>(inputs >> 8 * byte & 255u);
  return sums;
}
static inline Lanes to_float(Sums sums) {
  Lanes a;
  for (int lane = 0; lane < 16; ++lane) a.r[lane] = static_cast<float>(sums.r[lane]);
  return a;
}

#endif

constexpr std::int64_t kRounded = 32;  // inputs that share a scale
constexpr std::int64_t kChunk = 4096;  // inputs that are rounded at a time

// 32 inputs as scale · code for codes of −127 … 127, the largest being ±127; returns the scale, which is NaN if one of
// the inputs is infinite or NaN.
inline float round_inputs(const float* x, std::int8_t* codes) {
  const float total = sum(add(load(x), load(x + 16)));
#if defined(__AVX512F__)
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
  const __m512 inverse = _mm512_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);
  const auto round = [&](__m512 numbers) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, inverse)));
  };
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), round(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), round(high));
#else
  float most = 0.0f;
  for (int i = 0; i < kRounded; ++i) {
    const float size = x[i] < 0.0f ? -x[i] : x[i];
    most = size > most ? size : most;
  }
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to a whole number, which the lowest bits then hold
  for (int i = 0; i < kRounded; ++i) {
    const float shifted = x[i] * inverse + shift;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    codes[i] = static_cast<std::int8_t>(bits - 0x4b400000u);
  }
#endif
  return most / 127.0f + (total - total);  // the difference is 0, or NaN
}

// Inputs, rounded, and their sums.
struct Rounded {
  alignas(64) std::int8_t codes[kChunk];
  float scales[kChunk / kRounded];
  float totals[kChunk / kRounded];             // Σ of the inputs themselves
  std::int32_t code_totals[kChunk / kRounded];  // Σ of the codes

  // `count` inputs, a multiple of 32
  void fill(const float* inputs, std::int64_t count) {
    for (std::int64_t first = 0; first < count; first += kRounded) {
      const std::int64_t block = first / kRounded;
      scales[block] = round_inputs(inputs + first, codes + first);
      totals[block] = sum(add(load(inputs + first), load(inputs + first + 16)));
      std::int32_t code_total = 0;
      for (int i = 0; i < kRounded; ++i) code_total += codes[first + i];
      code_totals[block] = code_total;
    }
  }

  std::uint32_t four(std::int64_t first) const {
    std::uint32_t found;
    __builtin_memcpy(&found, codes + first, 4);
    return found;
  }
};
