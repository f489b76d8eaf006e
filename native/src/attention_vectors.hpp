// Sixteen numbers of a vector at a time, and squares of them turned.
//
// Included once for every instruction set, inside its own namespace.

// Sixteen numbers of a vector from number `i` on, zeros behind its end.
template <typename Stored>
static inline Lanes sixteen(const Vectors& from, std::int64_t vector, std::int64_t i) {
  const std::int64_t at = vector * from.stride + i, left = from.size - i;
  if (left >= 16) return Stored::all(from.data, at);
  constexpr std::size_t kBytes = kBits<Stored> / 8;
  alignas(64) unsigned char some[64] = {};
  __builtin_memcpy(some, static_cast<const unsigned char*>(from.data) + at * static_cast<std::int64_t>(kBytes),
                   static_cast<std::size_t>(left) * kBytes);
  return Stored::all(some, 0);
}

static inline void store_some(float* target, Lanes a, std::int64_t count) {
  if (count >= 16) return store(target, a);
  float all[16];
  store(all, a);
  __builtin_memcpy(target, all, static_cast<std::size_t>(count) * sizeof(float));
}

// Row i, column k of sixteen by sixteen numbers becomes row k, column i.
static inline void transpose(Lanes* a) {
#if defined(__AVX512F__)
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i].r, a[i + 1].r);
    t[i + 1] = _mm512_unpackhi_ps(a[i].r, a[i + 1].r);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(t[i + half]), high = _mm512_castps_pd(t[i + 2 + half]);
      u[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {  // u[4 k + i] holds the columns i, i + 4, … of the rows 4 k …
    const __m512 even = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), odd = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 last_even = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    const __m512 last_odd = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    a[i].r = _mm512_shuffle_f32x4(even, last_even, 0x88);
    a[8 + i].r = _mm512_shuffle_f32x4(even, last_even, 0xdd);
    a[4 + i].r = _mm512_shuffle_f32x4(odd, last_odd, 0x88);
    a[12 + i].r = _mm512_shuffle_f32x4(odd, last_odd, 0xdd);
  }
#else
  float all[16][16];
  for (int i = 0; i < 16; ++i) store(all[i], a[i]);
  for (int i = 0; i < 16; ++i) {
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = all[k][i];
    a[i] = load(column);
  }
#endif
}
