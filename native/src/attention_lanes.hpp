// What softmax needs of sixteen lanes besides what lanes.hpp has.
//
// Included once for every instruction set, inside its own namespace; it must not use anything from the standard
// library.

static inline float negative_infinity() { return as_float(0xff800000u); }

// 2^rest = 1 + rest · (…) for |rest| ≤ ½, with a relative error of 2e-9 before rounding; by weighted least squares.
constexpr float kPower[] = {0.00015353361959569156f, 0.0013398875016719103f, 0.00961843691766262f,
                            0.055503323674201965f,   0.24022647738456726f,   0.6931471824645996f};

static inline Lanes power_of_rest(Lanes rest) {
  Lanes p = spread(kPower[0]);
  for (int i = 1; i < 6; ++i) p = multiply_add(p, rest, spread(kPower[i]));
  return multiply_add(p, rest, spread(1.0f));
}

#if defined(__AVX512F__)

static inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.r, b.r)}; }
// b where a is NaN
static inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.r, b.r)}; }
static inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.r); }
// `other` in the lanes whose bit is not set
static inline Lanes choose(std::uint32_t bits, Lanes a, float other) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>(bits), a.r)};
}
// Below 2⁻¹²⁶ exactly 0; NaN stays.
static inline Lanes power_of_two(Lanes x) {
  const __m512 whole = _mm512_roundscale_ps(x.r, 8);  // to nearest, and no exception
  const Lanes p = power_of_rest({_mm512_sub_ps(x.r, whole)});
  const __mmask16 normal = _mm512_cmp_ps_mask(x.r, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, p.r, whole)};
}

#elif defined(__AVX2__)

static inline Lanes subtract(Lanes a, Lanes b) {
  return {{_mm256_sub_ps(a.r[0], b.r[0]), _mm256_sub_ps(a.r[1], b.r[1])}};
}
static inline Lanes larger(Lanes a, Lanes b) {
  return {{_mm256_max_ps(a.r[0], b.r[0]), _mm256_max_ps(a.r[1], b.r[1])}};
}
static inline float largest(Lanes a) {
  const __m256 eight = _mm256_max_ps(a.r[0], a.r[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline Lanes choose(std::uint32_t bits, Lanes a, float other) {
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  Lanes found;
  for (int half = 0; half < 2; ++half) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(bits >> 8 * half));
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(word, places), places);
    found.r[half] = _mm256_blendv_ps(_mm256_set1_ps(other), a.r[half], _mm256_castsi256_ps(set));
  }
  return found;
}
static inline Lanes power_of_two(Lanes x) {
  Lanes found;
  Lanes whole;
  for (int half = 0; half < 2; ++half) {  // the second operand where the first is no larger, or one of them is NaN
    const __m256 held = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x.r[half]));
    whole.r[half] = _mm256_round_ps(held, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    found.r[half] = _mm256_sub_ps(held, whole.r[half]);
  }
  const Lanes p = power_of_rest(found);
  for (int half = 0; half < 2; ++half) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole.r[half]), _mm256_set1_epi32(127));
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    const __m256 normal = _mm256_cmp_ps(x.r[half], _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    found.r[half] = _mm256_and_ps(_mm256_mul_ps(p.r[half], power), normal);
  }
  return found;
}

#else

static inline Lanes subtract(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] -= b.r[i];
  return a;
}
static inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}
static inline float largest(Lanes a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.r[i] = a.r[i] > a.r[i + half] ? a.r[i] : a.r[i + half];
  return a.r[0];
}
static inline Lanes choose(std::uint32_t bits, Lanes a, float other) {
  for (int i = 0; i < 16; ++i) a.r[i] = bits >> i & 1 ? a.r[i] : other;
  return a;
}
static inline Lanes power_of_two(Lanes x) {
  const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to a whole number, which the lowest bits then hold
  Lanes rest, power;
  for (int i = 0; i < 16; ++i) {
    float held = x.r[i] < -127.0f ? -127.0f : x.r[i];
    held = held > 128.0f ? 128.0f : held;
    const float shifted = held + shift;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    rest.r[i] = held - (shifted - shift);
    power.r[i] = as_float((bits - 0x4b400000u + 127u) << 23);
  }
  Lanes p = power_of_rest(rest);
  for (int i = 0; i < 16; ++i) p.r[i] = x.r[i] < -126.0f ? 0.0f : p.r[i] * power.r[i];
  return p;
}

#endif

static inline float power_of_two(float x) {
  float found[16];
  store(found, power_of_two(spread(x)));
  return found[0];
}

// Bit k is set where low ≤ k < high.
static inline std::uint32_t bits_between(std::int64_t low, std::int64_t high) {
  const std::uint32_t below_high = high >= 16 ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1u;
  const std::uint32_t below_low = low >= 16 ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1u;
  return below_high & ~below_low;
}

static inline std::uint16_t round_to_bfloat16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // NaN stays
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
