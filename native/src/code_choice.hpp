// The highest of many numbers, exactly so many, of equal ones the first: numbers above a limit are collected, and
// whenever there is no room left all but the best are dropped and the limit rises.
//
// Included by code_kernels.cpp, inside its namespace.

// Numbers of the same order as the scores; zeros of either sign are equal, NaN is above all.
inline std::uint32_t key_of(float score) {
  const std::uint32_t bits = bits_of(score + 0.0f);
  if (is_nan(bits)) return 0xffffffffu;
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// How many of `count` keys are at least `limit`; zeros follow up to a multiple of sixteen, and the limit is not zero.
inline std::int64_t at_least(const std::uint32_t* keys, std::int64_t count, std::uint32_t limit) {
  std::int64_t found = 0;
#if defined(__AVX512F__)
  const __m512i limits = _mm512_set1_epi32(static_cast<int>(limit));
  for (std::int64_t i = 0; i < count; i += 16)
    found += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), limits));
#else
  for (std::int64_t i = 0; i < count; i += 16) {
    int here = 0;
    for (int lane = 0; lane < 16; ++lane) here += keys[i + lane] >= limit;
    found += here;
  }
#endif
  return found;
}

// The highest number of which `wanted` keys are not below, as far as its upper `bits` say; zero if there are too few.
inline std::uint32_t limit_of(const std::uint32_t* keys, std::int64_t count, std::int64_t wanted, int bits) {
  std::uint32_t limit = 0;
  for (int bit = 31; bit >= 32 - bits; --bit) {
    const std::uint32_t tried = limit | 1u << bit;
    if (at_least(keys, count, tried) >= wanted) limit = tried;
  }
  return limit;
}

constexpr std::int64_t kKeys = 4096;  // for so many there is room on the stack

// Keeps the `wanted` best of `count` scores in their order. Returns how many are left, or −1 where there is a NaN.
inline std::int64_t best_of(float* scores, std::int32_t* places, std::int64_t count, std::int64_t wanted,
                            std::uint32_t* keys) {
  std::uint32_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    keys[i] = key_of(scores[i]);
    most = keys[i] > most ? keys[i] : most;
  }
  if (most == 0xffffffffu) return -1;
  if (count <= wanted) return count;
  for (std::int64_t i = count; i % 16; ++i) keys[i] = 0;
  const std::uint32_t limit = limit_of(keys, count, wanted, 32);
  std::int64_t equal = wanted;
  for (std::int64_t i = 0; i < count; ++i) equal -= keys[i] > limit;
  std::int64_t left = 0;
  for (std::int64_t i = 0; i < count && left < wanted; ++i) {
    if (keys[i] < limit || (keys[i] == limit && equal-- <= 0)) continue;
    scores[left] = scores[i];
    places[left++] = places[i];
  }
  return left;
}

inline float score_of(std::uint32_t key) { return as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

#if defined(__AVX512F__)
inline Lanes higher(Lanes a, Lanes b) { return {_mm512_max_ps(a.r, b.r)}; }  // b where a is NaN
#elif defined(__AVX2__)
inline Lanes higher(Lanes a, Lanes b) { return {{_mm256_max_ps(a.r[0], b.r[0]), _mm256_max_ps(a.r[1], b.r[1])}}; }
#else
inline Lanes higher(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}
#endif

constexpr int kColumns = 16;                 // registers of the highest of every so many-th number
constexpr std::int64_t kGroups = 16 * kColumns;

// Something that at least `wanted` scores are above: of 256 groups of them, the highest is known of each, and the
// wanted-th of these is close to what is looked for.
template <typename Stored>
inline float first_limit(const void* scores, std::int64_t count, std::int64_t wanted, bool positive) {
  const float none = positive ? 0.0f : as_float(0x7fc00000u);  // nothing is below NaN
  if (2 * wanted > kGroups || count < 8 * kGroups) return none;
  Lanes most[kColumns];
  for (int column = 0; column < kColumns; ++column) most[column] = Stored::all(scores, 16 * column);
  for (std::int64_t i = kGroups; i + kGroups <= count; i += kGroups) {
    fetch(scores, (i + kGroups) * (kBits<Stored> / 8) + kAhead);
    for (int column = 0; column < kColumns; ++column)
      most[column] = higher(Stored::all(scores, i + 16 * column), most[column]);
  }
  float highest[kGroups];
  std::uint32_t keys[kGroups];
  for (int column = 0; column < kColumns; ++column) store(highest + 16 * column, most[column]);
  for (std::int64_t i = 0; i < kGroups; ++i) keys[i] = key_of(highest[i]);
  const std::uint32_t limit = limit_of(keys, kGroups, wanted, 22);
  if (limit <= key_of(as_float(0xff800000u)) || limit >= 0xff800000u) return none;
  const float below = score_of(limit == 0x80000000u ? limit - 2 : limit - 1);  // below zero, −0 is no lower
  return positive && !(below > 0.0f) ? 0.0f : below;
}

// `keys` lie behind the spare scores.
template <typename Stored>
std::int64_t highest_of(const void* scores, std::int64_t count, std::int64_t wanted, bool positive, std::int32_t* indices,
                        float* values, float* spare, std::int32_t* spare_places, std::int64_t room) {
  auto* keys = reinterpret_cast<std::uint32_t*>(spare + room);
  std::int64_t held = 0;
  Lanes limit = spread(first_limit<Stored>(scores, count, wanted, positive));
  const auto take = [&](Lanes here, std::uint32_t bits, std::int64_t first) {
    if (held + 16 > room) {
      held = best_of(spare, spare_places, held, wanted, keys);
      if (held < 0) return false;
      float lowest = spare[0];
      for (std::int64_t i = 1; i < held; ++i) lowest = spare[i] < lowest ? spare[i] : lowest;
      limit = spread(lowest);
    }
    keep(spare + held, bits, here);
    keep_places(spare_places + held, bits, static_cast<std::int32_t>(first));
    held += __builtin_popcount(bits);
    return true;
  };
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    Lanes here[4];
    std::uint32_t bits[4];
    for (int j = 0; j < 4; ++j) here[j] = Stored::all(scores, i + 16 * j);
    for (int j = 0; j < 4; ++j) bits[j] = not_below(here[j], limit);
    fetch(scores, (i + 64) * (kBits<Stored> / 8) + kAhead);
    if (!(bits[0] | bits[1] | bits[2] | bits[3])) continue;
    for (int j = 0; j < 4; ++j)
      if (bits[j] && !take(here[j], bits[j], i + 16 * j)) return -1;
  }
  for (; i < count; i += 16) {
    const Lanes here = some<Stored>(scores, i, count - i);
    const std::uint32_t bits = not_below(here, limit) & (count - i < 16 ? (1u << (count - i)) - 1u : 0xffffu);
    if (bits && !take(here, bits, i)) return -1;
  }
  held = best_of(spare, spare_places, held, wanted, keys);
  if (held > 0) {
    __builtin_memcpy(values, spare, sizeof(float) * static_cast<std::size_t>(held));
    __builtin_memcpy(indices, spare_places, sizeof(std::int32_t) * static_cast<std::size_t>(held));
  }
  return held;
}

std::int64_t highest(const void* scores, Value value, std::int64_t count, std::int64_t wanted, bool positive,
                     std::int32_t* indices, float* values, float* spare, std::int32_t* spare_places,
                     std::int64_t room) {
  if (value == Value::float32)
    return highest_of<Float32>(scores, count, wanted, positive, indices, values, spare, spare_places, room);
  return highest_of<BFloat16>(scores, count, wanted, positive, indices, values, spare, spare_places, room);
}

// ------------------------------------------------------------------------------------------------ candidates

constexpr float kSlack = 4e-7f;  // of a score, for the rounding of what it is compared with

inline float margin_of(const Margins& margins, float of_token, float length, std::int64_t feature) {
  return of_token * margins.lengths[feature / kMarginRows] + length * margins.errors[feature / kMarginRows];
}

void sift(Candidates& found, std::int64_t wanted, const Margins& margins, float of_token, float length,
          std::int32_t room, float& limit) {
  std::uint32_t keys[kKeys];
  if (found.count < 0) return;
  if (room > kKeys) {
    found.count = -1;
    return;
  }
  for (std::int32_t i = 0; i < found.count; ++i) {
    const float low = found.scores[i] - margin_of(margins, of_token, length, found.features[i]);
    const float least = low - kSlack * (low > 0.0f ? low : -low);
    keys[i] = least > 0.0f ? bits_of(least) : 0;
  }
  for (std::int32_t i = found.count; i % 16; ++i) keys[i] = 0;
  const float least = as_float(limit_of(keys, found.count, wanted, 22));
  if (least > limit) limit = least;
  std::int32_t left = 0;
  for (std::int32_t i = 0; i < found.count; ++i) {
    const float score = found.scores[i];
    const float most = score + margin_of(margins, of_token, length, found.features[i]);
    if (!(most + kSlack * (most > 0.0f ? most : -most) >= limit)) continue;
    found.scores[left] = score;
    found.features[left++] = found.features[i];
  }
  found.count = left > room / 4 * 3 ? -1 : left;
}

// What a score must exceed to be a candidate of a token.
inline float cut_of(float limit, float margin) { return limit - margin - 2.0f * kSlack * limit; }

void collect(const float* scores, const float* bias, std::int64_t feature, int rows, const Margins& margins,
             const Group& group) {
  float longest = 0.0f, error = 0.0f;
  for (std::int64_t block = feature / kMarginRows; block <= (feature + rows - 1) / kMarginRows; ++block) {
    longest = margins.lengths[block] > longest ? margins.lengths[block] : longest;
    error = margins.errors[block] > error ? margins.errors[block] : error;
  }
  alignas(64) float cuts[kTokens];
  const auto cut = [&](int token) {
    const bool open = token < group.tokens && group.candidates[token].count >= 0;
    cuts[token] = open ? cut_of(group.limits[token], group.of_token[token] * longest + group.length[token] * error)
                       : as_float(0x7f800000u);
  };
  for (int token = 0; token < kTokens; ++token) cut(token);
  Lanes low = load(cuts), high = load(cuts + 16);
  for (int row = 0; row < rows; ++row) {
    const Lanes offset = spread(bias ? bias[feature + row] : 0.0f);
    const Lanes first = add(load(scores + kTokens * row), offset), second = add(load(scores + kTokens * row + 16), offset);
    std::uint32_t bits = not_below(first, low) | not_below(second, high) << 16;
    if (!bits) continue;
    float all[kTokens];
    store(all, first);
    store(all + 16, second);
    for (; bits; bits &= bits - 1) {
      const int token = __builtin_ctz(bits);
      if (token >= group.tokens || group.candidates[token].count < 0) continue;
      Candidates& found = group.candidates[token];
      if (found.count == group.room) {
        sift(found, group.wanted, margins, group.of_token[token], group.length[token], group.room,
             group.limits[token]);
        cut(token);
        low = load(cuts), high = load(cuts + 16);
        if (found.count < 0) continue;
      }
      found.scores[found.count] = all[token];
      found.features[found.count++] = static_cast<std::int32_t>(feature + row);
    }
  }
}
