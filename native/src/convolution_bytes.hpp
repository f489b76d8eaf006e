// Convolutions of whole numbers: ByteBlocks against 64 positions, and the rounding of inputs to bytes.
//
// Included by kernels.cpp after convolution.hpp, once for every instruction set, inside its namespace. It must not use
// anything from the standard library.
//
// Four kept channels are interleaved, so that a lane holds their bytes at one position; the sum of its four products
// with the four weights of one output channel is then a single instruction. The channels are any that a block keeps. All
// sums are exact, so that every instruction set gives the same.

// Sixty-four positions, four to a lane of 32 bits: the bytes of four channels, and sums. How positions are ordered in
// them is known to `interleave` and `in_order` alone.
struct Quads;
struct Totals;

#if defined(__AVX512VNNI__)

struct Quads {
  __m512i r[4];
};
struct Totals {
  __m512i r[4];
};
static inline Quads interleave(const std::uint8_t* a, const std::uint8_t* b, const std::uint8_t* c,
                               const std::uint8_t* d) {
  const __m512i one = _mm512_loadu_si512(a), two = _mm512_loadu_si512(b);
  const __m512i three = _mm512_loadu_si512(c), four = _mm512_loadu_si512(d);
  const __m512i low = _mm512_unpacklo_epi8(one, two), high = _mm512_unpackhi_epi8(one, two);
  const __m512i other_low = _mm512_unpacklo_epi8(three, four), other_high = _mm512_unpackhi_epi8(three, four);
  return {{_mm512_unpacklo_epi16(low, other_low), _mm512_unpackhi_epi16(low, other_low),
           _mm512_unpacklo_epi16(high, other_high), _mm512_unpackhi_epi16(high, other_high)}};
}
static inline void add_products(Totals& totals, const Quads& inputs, std::uint32_t weights) {
  const __m512i all = _mm512_set1_epi32(static_cast<int>(weights));
  for (int v = 0; v < 4; ++v) totals.r[v] = _mm512_dpbusd_epi32(totals.r[v], inputs.r[v], all);
}
// vector v of the interleaved order holds positions 4 v … 4 v + 3 of every sixteen
static inline void in_order(const Totals& totals, std::int32_t offset, Lanes (&to)[4]) {
  __m512 r[4], half[4];
  const __m512i less = _mm512_set1_epi32(offset);
  for (int v = 0; v < 4; ++v) r[v] = _mm512_cvtepi32_ps(_mm512_sub_epi32(totals.r[v], less));
  for (int pair = 0; pair < 2; ++pair) {
    half[pair] = _mm512_shuffle_f32x4(r[2 * pair], r[2 * pair + 1], 0x44);
    half[2 + pair] = _mm512_shuffle_f32x4(r[2 * pair], r[2 * pair + 1], 0xee);
  }
  for (int v = 0; v < 4; ++v)
    to[v] = {v & 1 ? _mm512_shuffle_f32x4(half[v & 2], half[(v & 2) + 1], 0xdd)
                   : _mm512_shuffle_f32x4(half[v & 2], half[(v & 2) + 1], 0x88)};
}

#elif defined(__AVX2__)

struct Quads {
  __m256i r[8];
};
struct Totals {
  __m256i r[8];
};
static inline Quads interleave(const std::uint8_t* a, const std::uint8_t* b, const std::uint8_t* c,
                               const std::uint8_t* d) {
  Quads found;
  for (int half = 0; half < 2; ++half) {
    const auto at = [&](const std::uint8_t* from) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
    };
    const __m256i one = at(a), two = at(b), three = at(c), four = at(d);
    const __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
    const __m256i other_low = _mm256_unpacklo_epi8(three, four), other_high = _mm256_unpackhi_epi8(three, four);
    const __m256i r[4] = {_mm256_unpacklo_epi16(low, other_low), _mm256_unpackhi_epi16(low, other_low),
                          _mm256_unpacklo_epi16(high, other_high), _mm256_unpackhi_epi16(high, other_high)};
    for (int pair = 0; pair < 2; ++pair) {
      found.r[4 * half + pair] = _mm256_permute2x128_si256(r[2 * pair], r[2 * pair + 1], 0x20);
      found.r[4 * half + 2 + pair] = _mm256_permute2x128_si256(r[2 * pair], r[2 * pair + 1], 0x31);
    }
  }
  return found;
}
// products of bytes do not fit in pairs into 16 bits, so that even and odd ones are multiplied apart
static inline void add_products(Totals& totals, const Quads& inputs, std::uint32_t weights) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(weights)), bytes = _mm256_set1_epi16(255);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
  for (int v = 0; v < 8; ++v) {
    const __m256i first = _mm256_madd_epi16(_mm256_and_si256(inputs.r[v], bytes), even);
    const __m256i second = _mm256_madd_epi16(_mm256_srli_epi16(inputs.r[v], 8), odd);
    totals.r[v] = _mm256_add_epi32(totals.r[v], _mm256_add_epi32(first, second));
  }
}
static inline void in_order(const Totals& totals, std::int32_t offset, Lanes (&to)[4]) {
  const __m256i less = _mm256_set1_epi32(offset);
  for (int v = 0; v < 8; ++v) to[v / 2].r[v % 2] = _mm256_cvtepi32_ps(_mm256_sub_epi32(totals.r[v], less));
}

#else

struct Quads {
  std::uint8_t r[64][4];
};
struct Totals {
  std::int32_t r[64];
};
static inline Quads interleave(const std::uint8_t* a, const std::uint8_t* b, const std::uint8_t* c,
                               const std::uint8_t* d) {
  Quads found;
  for (int i = 0; i < 64; ++i) {
    found.r[i][0] = a[i];
    found.r[i][1] = b[i];
    found.r[i][2] = c[i];
    found.r[i][3] = d[i];
  }
  return found;
}
static inline void add_products(Totals& totals, const Quads& inputs, std::uint32_t weights) {
  for (int i = 0; i < 64; ++i)
    for (int byte = 0; byte < 4; ++byte)
      totals.r[i] += static_cast<std::int32_t>(inputs.r[i][byte]) * static_cast<std::int8_t>(weights >> 8 * byte & 255u);
}
static inline void in_order(const Totals& totals, std::int32_t offset, Lanes (&to)[4]) {
  for (int i = 0; i < 64; ++i) to[i / 16].r[i % 16] = static_cast<float>(totals.r[i] - offset);
}

#endif

// `Part` channels of a block, which share the interleaved inputs.
template <int Part>
void convolve_bytes(const ByteBlocks& matrix, std::int64_t block, int part, const ByteStrip& strip) {
  Totals totals[Part] = {};
  const std::int64_t size = static_cast<std::int64_t>(matrix.block) * 4;
  for (std::int64_t four = matrix.starts[block]; four < matrix.starts[block + 1]; ++four) {
    const std::uint8_t* from[4];
    for (int i = 0; i < 4; ++i) from[i] = strip.inputs + matrix.places[4 * four + i] * strip.stride;
    const std::int8_t* weights = matrix.values + four * matrix.taps * size + 4 * part;
    for (int tap = 0; tap < matrix.taps; ++tap, weights += size) {
      const std::int64_t there = strip.taps[tap];
      const Quads inputs = interleave(from[0] + there, from[1] + there, from[2] + there, from[3] + there);
      for (int c = 0; c < Part; ++c) {
        std::uint32_t word;
        __builtin_memcpy(&word, weights + 4 * c, 4);
        add_products(totals[c], inputs, word);
      }
    }
  }
  const Lanes low = spread(matrix.low), high = spread(matrix.high);
  for (int c = 0; c < Part; ++c) {
    const std::int64_t channel = block * matrix.block + part + c;
    if (channel >= matrix.outputs) return;
    Lanes sums[4];
    in_order(totals[c], strip.zero * matrix.totals[channel], sums);
    const Lanes scale = spread(strip.scale * matrix.scales[channel]);
    const Lanes added = spread(matrix.bias ? matrix.bias[channel] : 0.0f);
    for (Lanes& one : sums) one = at_most(high, at_least(low, multiply_add(one, scale, added)));
    put<4>(strip.to, channel, sums);
  }
}

void convolution_bytes(const ByteBlocks& matrix, std::int64_t first, std::int64_t last, const ByteStrip& strip) {
  for (std::int64_t block = first; block < last; ++block) {
    if (matrix.block == 1) convolve_bytes<1>(matrix, block, 0, strip);
    else if (matrix.block == 2) convolve_bytes<2>(matrix, block, 0, strip);
    else
      for (int part = 0; part < matrix.block; part += 4) convolve_bytes<4>(matrix, block, part, strip);
  }
}

// Widen the interval from `low` to `high` until it holds `count` values; false if one of them is infinite or NaN.
bool find_range(const float* source, std::int64_t count, float& low, float& high) {
  Lanes least = spread(low), most = spread(high), total = zero();
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const Lanes x = load(source + i);
    least = at_most(x, least);
    most = at_least(x, most);
    total = multiply_add(zero(), x, total);
  }
  float all[2][16], rest = sum(total);
  store(all[0], least);
  store(all[1], most);
  for (int lane = 0; lane < 16; ++lane) {
    low = all[0][lane] < low ? all[0][lane] : low;
    high = all[1][lane] > high ? all[1][lane] : high;
  }
  for (; i < count; ++i) {
    low = source[i] < low ? source[i] : low;
    high = source[i] > high ? source[i] : high;
    rest += 0.0f * source[i];
  }
  return rest == 0.0f;
}

// Nearest whole numbers of 0 … 255 to x · inverse + zero, ties to even; false if an x is infinite or NaN.
bool round_to_bytes(const float* source, std::int64_t count, float inverse, float zero_point, std::uint8_t* target) {
  const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to a whole number, which the lowest bits then hold
  std::uint32_t all = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, source + i, 4);
    all |= (bits & 0x7f800000u) == 0x7f800000u;
    float value = source[i] * inverse + zero_point;
    value = value > 0.0f ? value : 0.0f;
    value = value < 255.0f ? value : 255.0f;
    value += shift;
    __builtin_memcpy(&bits, &value, 4);
    target[i] = static_cast<std::uint8_t>(bits - 0x4b400000u);
  }
  return !all;
}
