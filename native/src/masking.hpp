// Masks of one bit a weight, applied in place: where the bit is 0, a value becomes +0.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library.
//
// The time goes to memory. A cache line in which nothing has to change is read and not written, which halves the
// traffic where most zeros are zero already, as in the state of an optimiser.

// 64 bits of a mask, of which those behind the last element count as ones.
inline std::uint64_t mask_word(const std::uint8_t* bits, std::int64_t word, std::int64_t count) {
  std::uint64_t found = ~0ull;
  const std::int64_t left = count - word * 64;
  if (left >= 64) {
    __builtin_memcpy(&found, bits + word * 8, 8);
    return found;
  }
  __builtin_memcpy(&found, bits + word * 8, static_cast<std::size_t>((left + 7) / 8));
  return found | ~0ull << left;
}

// One cache line of values, of 2, 4 or 8 bytes each; `removed` has a bit for each of them.
template <int Bytes>
struct MaskedLine;

#if defined(__AVX512BW__)
template <>
struct MaskedLine<2> {
  static void apply(void* line, std::uint64_t removed) {
    const auto mask = static_cast<__mmask32>(removed);
    const __m512i values = _mm512_loadu_si512(line);
    if (_mm512_mask_test_epi16_mask(mask, values, values))
      _mm512_storeu_si512(line, _mm512_mask_mov_epi16(values, mask, _mm512_setzero_si512()));
  }
};
template <>
struct MaskedLine<4> {
  static void apply(void* line, std::uint64_t removed) {
    const auto mask = static_cast<__mmask16>(removed);
    const __m512i values = _mm512_loadu_si512(line);
    if (_mm512_mask_test_epi32_mask(mask, values, values))
      _mm512_storeu_si512(line, _mm512_mask_mov_epi32(values, mask, _mm512_setzero_si512()));
  }
};
template <>
struct MaskedLine<8> {
  static void apply(void* line, std::uint64_t removed) {
    const auto mask = static_cast<__mmask8>(removed);
    const __m512i values = _mm512_loadu_si512(line);
    if (_mm512_mask_test_epi64_mask(mask, values, values))
      _mm512_storeu_si512(line, _mm512_mask_mov_epi64(values, mask, _mm512_setzero_si512()));
  }
};
#elif defined(__AVX2__)
inline void remove(void* there, __m256i removed) {
  const __m256i values = _mm256_loadu_si256(static_cast<const __m256i*>(there));
  if (!_mm256_testz_si256(values, removed))
    _mm256_storeu_si256(static_cast<__m256i*>(there), _mm256_andnot_si256(removed, values));
}
template <>
struct MaskedLine<2> {
  static void apply(void* line, std::uint64_t removed) {
    const __m256i bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    for (int half = 0; half < 2; ++half) {
      const __m256i spread_bits = _mm256_set1_epi16(static_cast<short>(removed >> (16 * half)));
      remove(static_cast<char*>(line) + 32 * half, _mm256_cmpeq_epi16(_mm256_and_si256(spread_bits, bits), bits));
    }
  }
};
template <>
struct MaskedLine<4> {
  static void apply(void* line, std::uint64_t removed) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int half = 0; half < 2; ++half) {
      const __m256i spread_bits = _mm256_set1_epi32(static_cast<int>(removed >> (8 * half)));
      remove(static_cast<char*>(line) + 32 * half, _mm256_cmpeq_epi32(_mm256_and_si256(spread_bits, bits), bits));
    }
  }
};
template <>
struct MaskedLine<8> {
  static void apply(void* line, std::uint64_t removed) {
    const __m256i bits = _mm256_setr_epi64x(1, 2, 4, 8);
    for (int half = 0; half < 2; ++half) {
      const __m256i spread_bits = _mm256_set1_epi64x(static_cast<long long>(removed >> (4 * half)));
      remove(static_cast<char*>(line) + 32 * half, _mm256_cmpeq_epi64(_mm256_and_si256(spread_bits, bits), bits));
    }
  }
};
#else
template <typename Word>
inline void remove_words(void* line, std::uint64_t removed) {
  constexpr int kCount = 64 / sizeof(Word);
  Word values[kCount], changed = 0;
  __builtin_memcpy(values, line, 64);
  for (int i = 0; i < kCount; ++i) {
    const Word gone = static_cast<Word>(0 - (removed >> i & 1));
    changed |= values[i] & gone;
    values[i] &= static_cast<Word>(~gone);
  }
  if (changed) __builtin_memcpy(line, values, 64);
}
template <>
struct MaskedLine<2> {
  static void apply(void* line, std::uint64_t removed) { remove_words<std::uint16_t>(line, removed); }
};
template <>
struct MaskedLine<4> {
  static void apply(void* line, std::uint64_t removed) { remove_words<std::uint32_t>(line, removed); }
};
template <>
struct MaskedLine<8> {
  static void apply(void* line, std::uint64_t removed) { remove_words<std::uint64_t>(line, removed); }
};
#endif

template <int Bytes>
void mask_words(void* values, const std::uint8_t* bits, std::int64_t first, std::int64_t last, std::int64_t count) {
  constexpr int kLine = 64 / Bytes;
  auto* bytes = static_cast<char*>(values);
  for (std::int64_t word = first; word < last; ++word) {
    const std::uint64_t removed = ~mask_word(bits, word, count);
    if (!removed) continue;
    char* there = bytes + word * 64 * Bytes;
    if (count - word * 64 >= 64) {
      for (int line = 0; line < Bytes; ++line) MaskedLine<Bytes>::apply(there + 64 * line, removed >> (kLine * line));
      continue;
    }
    for (std::int64_t i = 0; i < count - word * 64; ++i)
      if (removed >> i & 1) __builtin_memset(there + i * Bytes, 0, Bytes);
  }
}

// Words of 64 elements; false if values of so many bytes have no kernel.
bool mask_values(void* values, int bytes, const std::uint8_t* bits, std::int64_t first, std::int64_t last,
                 std::int64_t count) {
  switch (bytes) {
    case 2: return mask_words<2>(values, bits, first, last, count), true;
    case 4: return mask_words<4>(values, bits, first, last, count), true;
    case 8: return mask_words<8>(values, bits, first, last, count), true;
    default: return false;
  }
}
