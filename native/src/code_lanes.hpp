// What sparse codes need of sixteen lanes besides what lanes.hpp has.
//
// Included once for every instruction set, inside its own namespace; it must not use anything from the standard
// library.

#if defined(__AVX512F__)

// Bit i is set where a is above b, or one of them is NaN.
static inline std::uint32_t not_below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_NLE_UQ); }
// The lanes whose bits are set, one after the other; what lies behind them may be overwritten up to sixteen.
static inline void keep(float* target, std::uint32_t bits, Lanes a) {
  _mm512_storeu_ps(target, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), a.r));
}
static inline void keep_places(std::int32_t* target, std::uint32_t bits, std::int32_t first) {
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(first),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), places));
}
static inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.r, b.r)}; }

#else

#if defined(__AVX2__)
static inline std::uint32_t not_below(Lanes a, Lanes b) {
  std::uint32_t bits = 0;
  for (int half = 0; half < 2; ++half)
    bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.r[half], b.r[half], _CMP_NLE_UQ))) << 8 * half;
  return bits;
}
static inline Lanes subtract(Lanes a, Lanes b) {
  return {{_mm256_sub_ps(a.r[0], b.r[0]), _mm256_sub_ps(a.r[1], b.r[1])}};
}
#else
static inline std::uint32_t not_below(Lanes a, Lanes b) {
  std::uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<std::uint32_t>(!(a.r[i] <= b.r[i])) << i;
  return bits;
}
static inline Lanes subtract(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] -= b.r[i];
  return a;
}
#endif
static inline void keep(float* target, std::uint32_t bits, Lanes a) {
  float all[16];
  store(all, a);
  for (; bits; bits &= bits - 1) *target++ = all[__builtin_ctz(bits)];
}
static inline void keep_places(std::int32_t* target, std::uint32_t bits, std::int32_t first) {
  for (; bits; bits &= bits - 1) *target++ = first + __builtin_ctz(bits);
}

#endif

// Sixteen numbers of which only `count` can be read, then zeros.
template <typename Stored>
static inline Lanes some(const void* data, std::int64_t first, std::int64_t count) {
  if (count >= 16) return Stored::all(data, first);
  alignas(64) char room[64] = {};
  constexpr std::int64_t kBytes = kBits<Stored> / 8;
  __builtin_memcpy(room, static_cast<const char*>(data) + first * kBytes, static_cast<std::size_t>(count * kBytes));
  return Stored::all(room, 0);
}
static inline void store_some(float* target, Lanes a, std::int64_t count) {
  if (count >= 16) return store(target, a);
  float all[16];
  store(all, a);
  __builtin_memcpy(target, all, sizeof(float) * static_cast<std::size_t>(count));
}

static inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
static inline bool is_nan(std::uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
