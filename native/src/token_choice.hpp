// Which tokens have the highest scores, exactly so many, without sorting.
//
// Scores become whole numbers of the same order, among which a limit is found by halves. A sample of them tells above
// which number the wanted ones probably lie, so that only those above are compared with limits; where the sample
// deceives, all are.
//
// Included once for every instruction set, inside its own namespace; it must not use anything from the standard
// library.

// A number that is higher where a score is; zeros of either sign are equal, and NaN is above all.
inline std::uint32_t rank_of(float score) {
  score += 0.0f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  bits ^= static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000u;
  return score != score ? 0xffffffffu : bits;
}

// How many ranks are not below a limit.
inline std::int64_t count_from(const std::uint32_t* ranks, std::int64_t tokens, std::uint32_t limit) {
  std::int64_t whole = 0;
  std::uint32_t found = 0;
#if defined(__AVX512F__)
  whole = tokens & ~std::int64_t{63};
  const __m512i limits = _mm512_set1_epi32(static_cast<int>(limit)), one = _mm512_set1_epi32(1);
  __m512i sums[4] = {};
  for (std::int64_t i = 0; i < whole; i += 64)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      sums[k] = _mm512_mask_add_epi32(sums[k], _mm512_cmpge_epu32_mask(_mm512_loadu_si512(ranks + i + 16 * k), limits),
                                      sums[k], one);
  found = static_cast<std::uint32_t>(_mm512_reduce_add_epi32(
      _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]))));
#endif
  for (std::int64_t i = whole; i < tokens; ++i) found += ranks[i] >= limit ? 1u : 0u;
  return found;
}

// The count-th highest rank; `count` becomes how many of this very rank are wanted.
inline std::uint32_t limit_of(const std::uint32_t* ranks, std::int64_t tokens, std::int64_t& count) {
  std::uint32_t low = 0xffffffffu, high = 0;
  for (std::int64_t i = 0; i < tokens; ++i) {
    low = ranks[i] < low ? ranks[i] : low;
    high = ranks[i] > high ? ranks[i] : high;
  }
  std::int64_t above = 0;  // ranks that are higher than `high`
  while (low < high) {     // enough are not below `low`
    const std::uint32_t middle = low + (high - low) / 2 + 1;
    const std::int64_t found = count_from(ranks, tokens, middle);
    if (found >= count) low = middle;
    else high = middle - 1, above = found;
  }
  count -= above;
  return low;
}

constexpr std::int64_t kSample = 1024, kLeastStep = 4;

// A score that probably somewhat more than `count` are not below, and so are all where a sample would be no help.
inline float likely_floor(const float* scores, std::int64_t tokens, std::int64_t count) {
  const std::int64_t step = tokens / kSample, expected = count * kSample / tokens;
  std::int64_t wanted = expected + expected / 2 + 16;  // four standard deviations more, or above
  if (step < kLeastStep || wanted >= kSample) return negative_infinity();
  std::uint32_t sample[kSample];
  for (std::int64_t i = 0; i < kSample; ++i) sample[i] = rank_of(scores[i * step]);
  const std::uint32_t limit = limit_of(sample, kSample, wanted);
  return as_float(limit ^ (limit >> 31 ? 0x80000000u : 0xffffffffu));
}

// The scores that are not below `floor`, or NaN, and whose they are, ascending; returns how many there are. There is
// room for sixteen more than all.
inline std::int64_t keep_above(const float* scores, std::int64_t tokens, float floor, float* kept,
                               std::uint32_t* places) {
  std::int64_t left = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 floors = _mm512_set1_ps(floor);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= tokens; i += 16, here = _mm512_add_epi32(here, step)) {
    const __m512 some = _mm512_loadu_ps(scores + i);
    const __mmask16 found = _mm512_cmp_ps_mask(some, floors, _CMP_NLT_UQ);
    _mm512_storeu_ps(kept + left, _mm512_maskz_compress_ps(found, some));
    _mm512_storeu_si512(places + left, _mm512_maskz_compress_epi32(found, here));
    left += __builtin_popcount(found);
  }
#endif
  for (; i < tokens; ++i) {
    kept[left] = scores[i];
    places[left] = static_cast<std::uint32_t>(i);
    left += !(scores[i] < floor);
  }
  return left;
}

void choose_highest(const float* scores, std::int64_t tokens, std::int64_t count, std::int64_t* places, float* room) {
  float* kept = room;
  auto *ranks = reinterpret_cast<std::uint32_t*>(room), *theirs = ranks + tokens + 16;
  std::int64_t some = keep_above(scores, tokens, likely_floor(scores, tokens, count), kept, theirs);
  if (some < count) some = keep_above(scores, tokens, negative_infinity(), kept, theirs);
  for (std::int64_t i = 0; i < some; ++i) {
    const std::uint32_t one = rank_of(kept[i]);
    __builtin_memcpy(room + i, &one, 4);
  }
  std::int64_t equal = count;
  const std::uint32_t limit = limit_of(ranks, some, equal);
  for (std::int64_t i = 0, done = 0; done < count; ++i) {  // without a branch, as nothing could foretell it
    const std::int64_t same = ranks[i] == limit;
    places[done] = theirs[i];
    done += static_cast<std::int64_t>(ranks[i] > limit) | (same & static_cast<std::int64_t>(equal > 0));
    equal -= same;
  }
}
