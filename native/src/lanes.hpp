// Sixteen float32 lanes, in whatever registers an instruction set has, and the ways to fill them.
//
// Included once for every instruction set, inside its own namespace; it must not use anything from the standard
// library, whose inline functions the linker would merge across instruction sets.

struct Lanes;
static inline Lanes zero();
static inline Lanes load(const float* source);
static inline Lanes spread(float value);
static inline void store(float* target, Lanes a);
static inline Lanes multiply(Lanes a, Lanes b);
static inline Lanes add(Lanes a, Lanes b);
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes c);  // a · b + c
static inline float sum(Lanes a);

static inline float as_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  if (rest >= 0x400u) return as_float(sign | ((rest << 13) + 0x38000000u));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: multiples of 2⁻²⁴
  return sign ? -small : small;
}

#if defined(__AVX512F__)

struct Lanes {
  __m512 r;
};
static inline Lanes zero() { return {_mm512_setzero_ps()}; }
static inline Lanes load(const float* source) { return {_mm512_loadu_ps(source)}; }
static inline Lanes spread(float value) { return {_mm512_set1_ps(value)}; }
static inline void store(float* target, Lanes a) { _mm512_storeu_ps(target, a.r); }
static inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.r, b.r)}; }
static inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.r, b.r)}; }
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
static inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.r); }

static inline __m512 widen_bits(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
struct Float32 {
  static Lanes all(const void* p, std::int64_t i) { return load(static_cast<const float*>(p) + i); }
};
struct BFloat16 {
  static Lanes all(const void* p, std::int64_t i) {
    return {widen_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(p) + i)))};
  }
};
struct Float16 {
  static Lanes all(const void* p, std::int64_t i) {
    return {_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(p) + i)))};
  }
};
struct Int8 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::int8_t*>(p) + i));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
};
static inline Lanes place(Lanes kept, std::uint32_t mask) {
  return {_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), kept.r)};
}
static inline Lanes look_up(std::uint64_t word, Lanes table) {
  const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i nibbles = _mm512_srlv_epi32(_mm512_set1_epi64(static_cast<long long>(word)), shifts);
  return {_mm512_permutexvar_ps(nibbles, table.r)};  // which looks at four bits of each index
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 r[2];
};
static inline Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline Lanes load(const float* source) { return {{_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}}; }
static inline Lanes spread(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
static inline void store(float* target, Lanes a) {
  _mm256_storeu_ps(target, a.r[0]);
  _mm256_storeu_ps(target + 8, a.r[1]);
}
static inline Lanes multiply(Lanes a, Lanes b) {
  return {{_mm256_mul_ps(a.r[0], b.r[0]), _mm256_mul_ps(a.r[1], b.r[1])}};
}
static inline Lanes add(Lanes a, Lanes b) { return {{_mm256_add_ps(a.r[0], b.r[0]), _mm256_add_ps(a.r[1], b.r[1])}}; }
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return {{_mm256_fmadd_ps(a.r[0], b.r[0], c.r[0]), _mm256_fmadd_ps(a.r[1], b.r[1], c.r[1])}};
}
static inline float sum(Lanes a) {
  const __m256 eight = _mm256_add_ps(a.r[0], a.r[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline __m256 widen_bits(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
struct Float32 {
  static Lanes all(const void* p, std::int64_t i) { return load(static_cast<const float*>(p) + i); }
};
struct BFloat16 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(p) + i);
    return {{widen_bits(_mm_loadu_si128(halves)), widen_bits(_mm_loadu_si128(halves + 1))}};
  }
};
struct Float16 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(p) + i);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
  }
};
struct Int8 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::int8_t*>(p) + i));
    return {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
             _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))}};
  }
};

// AVX2 has no expansion: eight bits choose a permutation from a table. It is made by the compiler, since nothing of
// this unit may run while the module is loaded, perhaps by a processor that lacks the instructions.
struct Permutations {
  alignas(32) std::uint32_t lanes[256][8] = {};
  constexpr Permutations() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane) lanes[mask][lane] = mask >> lane & 1 ? next++ : 0;
  }
};
static constexpr Permutations permutations;
static inline __m256 place_eight(__m256 kept, std::uint32_t mask) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(permutations.lanes[mask]));
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i held = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
  return _mm256_and_ps(_mm256_permutevar8x32_ps(kept, lanes), _mm256_castsi256_ps(held));
}
static inline Lanes place(Lanes kept, std::uint32_t mask) {
  const std::uint32_t low = mask & 0xff;
  alignas(32) float all[16];
  store(all, kept);
  return {{place_eight(kept.r[0], low), place_eight(_mm256_loadu_ps(all + __builtin_popcount(low)), mask >> 8)}};
}
static inline Lanes look_up(std::uint64_t word, Lanes table) {
  const __m256i both = _mm256_set1_epi64x(static_cast<long long>(word));
  Lanes found;
  for (int half = 0; half < 2; ++half) {
    const __m256i shifts = half ? _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28)
                                : _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    const __m256i nibbles = _mm256_srlv_epi32(both, shifts);
    const __m256 low = _mm256_permutevar8x32_ps(table.r[0], nibbles);  // which looks at three bits of each index
    const __m256 high = _mm256_permutevar8x32_ps(table.r[1], nibbles);
    found.r[half] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)));
  }
  return found;
}

#else

struct Lanes {
  float r[16];
};
static inline Lanes zero() { return {}; }
static inline Lanes load(const float* source) {
  Lanes a;
  __builtin_memcpy(a.r, source, sizeof a.r);
  return a;
}
static inline Lanes spread(float value) {
  Lanes a;
  for (float& lane : a.r) lane = value;
  return a;
}
static inline void store(float* target, Lanes a) { __builtin_memcpy(target, a.r, sizeof a.r); }
static inline Lanes multiply(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] *= b.r[i];
  return a;
}
static inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] += b.r[i];
  return a;
}
static inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 16; ++i) c.r[i] += a.r[i] * b.r[i];
  return c;
}
static inline float sum(Lanes a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.r[i] += a.r[i + half];
  return a.r[0];
}
struct Float32 {
  static Lanes all(const void* p, std::int64_t i) { return load(static_cast<const float*>(p) + i); }
};
struct BFloat16 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* halves = static_cast<const std::uint16_t*>(p) + i;
    Lanes a;
    for (int lane = 0; lane < 16; ++lane) a.r[lane] = as_float(static_cast<std::uint32_t>(halves[lane]) << 16);
    return a;
  }
};
struct Float16 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* halves = static_cast<const std::uint16_t*>(p) + i;
    Lanes a;
    for (int lane = 0; lane < 16; ++lane) a.r[lane] = half_to_float(halves[lane]);
    return a;
  }
};
struct Int8 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* bytes = static_cast<const std::int8_t*>(p) + i;
    Lanes a;
    for (int lane = 0; lane < 16; ++lane) a.r[lane] = static_cast<float>(bytes[lane]);
    return a;
  }
};
static inline Lanes place(Lanes kept, std::uint32_t mask) {
  Lanes a = zero();
  for (int next = 0; mask; mask &= mask - 1) a.r[__builtin_ctz(mask)] = kept.r[next++];
  return a;
}
static inline Lanes look_up(std::uint64_t word, Lanes table) {
  Lanes a;
  for (int lane = 0; lane < 16; ++lane) a.r[lane] = table.r[word >> (32 * (lane & 1) + 4 * (lane >> 1)) & 15];
  return a;
}

#endif

// What is read once, from one end to the other, comes sooner if it is asked for: the guesses of a processor stop at the
// end of a page. Nothing happens where no memory is.
constexpr std::int64_t kAhead = 1024;  // bytes
static inline void fetch(const void* source, std::int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(source) + static_cast<std::uintptr_t>(bytes)));
}

// Bits of a stored value.
template <typename Value>
constexpr int kBits = 8;
template <>
constexpr int kBits<Float32> = 32;
template <>
constexpr int kBits<BFloat16> = 16;
template <>
constexpr int kBits<Float16> = 16;

// Whether none of the inputs, which zeros follow up to a multiple of sixteen, is infinite or NaN.
static inline bool all_finite(const float* inputs, std::int64_t columns) {
  Lanes total = zero();
  for (std::int64_t column = 0; column < columns; column += 16)
    total = multiply_add(zero(), load(inputs + column), total);
  return sum(total) == 0.0f;
}

// Kept four-bit values begin at any nibble; the first is the lower half of a byte. Two's complement, −8 … 7.
struct Int4 {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* bytes = static_cast<const std::uint8_t*>(p) + (i >> 1);
    const int shift = 4 * static_cast<int>(i & 1);
    std::uint64_t word;
    __builtin_memcpy(&word, bytes, 8);
    word = word >> shift | static_cast<std::uint64_t>(bytes[8]) << 4 << (60 - shift);
    // from the order of memory into the order that look_up reads: even nibbles below, odd ones above
    static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return look_up(even_nibbles(word) | even_nibbles(word >> 4) << 32, load(values));
  }

 private:
  static std::uint64_t even_nibbles(std::uint64_t word) {
#if defined(__BMI2__)
    return _pext_u64(word, 0x0f0f0f0f0f0f0f0full);
#else
    word &= 0x0f0f0f0f0f0f0f0full;
    word = (word | word >> 4) & 0x00ff00ff00ff00ffull;
    word = (word | word >> 8) & 0x0000ffff0000ffffull;
    return (word | word >> 16) & 0xffffffffull;
#endif
  }
};
template <>
constexpr int kBits<Int4> = 4;
