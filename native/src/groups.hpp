// Products with matrices of which whole groups of sixteen adjacent weights are kept: GroupRows.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library.
//
// A weight is s (q − z) = s q − s z. The two factors of sixteen groups, and where their inputs lie, are made at once and
// kept in the first-level cache. What remains for a group is a look-up of its codes, one fused multiply-add that makes
// its weights, and one for each vector of the batch. A scale has eleven significant bits and a code four, so that every
// one of these products and differences is exact in float32: the weights do not depend on the instruction set.

inline Lanes codes() {
  static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(values);
}

// What sixteen groups from a multiple of sixteen on need besides their codes: scales, minus scales times zeros, and
// the columns at which they begin.
struct Grids {
  alignas(64) float scales[16];
  alignas(64) float offsets[16];
  alignas(64) std::uint32_t columns[16];
  std::int64_t block = -1;

  void decode(const GroupRows& matrix, std::int64_t wanted, Lanes table) {
    if (wanted == block) return;
    block = wanted;
    const Lanes steps = Float16::all(matrix.scales, wanted * 16);
    store(scales, steps);
    store(offsets, multiply(multiply(steps, spread(-1.0f)), look_up(matrix.zeros[wanted], table)));
    const std::uint16_t* places = matrix.places + wanted * 16;
    for (int k = 0; k < 16; ++k) columns[k] = static_cast<std::uint32_t>(places[k]) * 16u;
  }

  Lanes weights(std::uint64_t word, int k, Lanes table) const {
    return multiply_add(look_up(word, table), spread(scales[k]), spread(offsets[k]));
  }
};

// Σ 0 · x over the columns whose groups are not kept: 0, or NaN if one of these inputs is infinite or NaN.
inline float skipped(const GroupRows& matrix, std::int64_t row, const float* inputs) {
  Lanes total = zero();
  std::int64_t next = matrix.starts[row];
  for (std::int64_t place = 0; place * 16 < matrix.columns; ++place) {
    const bool kept = next < matrix.starts[row + 1] && matrix.places[next] == place;
    if (kept) ++next;
    else total = multiply_add(zero(), load(inputs + place * 16), total);
  }
  return sum(total);
}

template <int Count>
void group_rows(const GroupRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                std::int64_t stride, float* outputs, std::int64_t output_stride) {
  constexpr int kWays = Count == 1 ? 4 : 2;  // sums of one vector, so that additions need not wait for each other
  const Lanes table = codes();
  Grids grids;
  for (std::int64_t row = first; row < last; ++row) {
    Lanes sums[Count][kWays];
    for (auto& ways : sums)
      for (Lanes& way : ways) way = zero();
    std::int64_t group = matrix.starts[row];
    const std::int64_t end = matrix.starts[row + 1];
    while (group < end) {
      const std::int64_t block = group >> 4, left = end - block * 16;
      const int begin = static_cast<int>(group & 15), stop = left < 16 ? static_cast<int>(left) : 16;
      const std::uint64_t* words = matrix.words + block * 16;
      grids.decode(matrix, block, table);
      const auto use = [&](int k, int way) {
        const Lanes weights = grids.weights(words[k], k, table);
        const float* there = inputs + grids.columns[k];
        for (int b = 0; b < Count; ++b)
          sums[b][way] = multiply_add(weights, load(there + b * stride), sums[b][way]);
      };
      if (stop - begin == 16) {
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) use(k, k % kWays);
      } else {
        int k = begin;
        for (; k + kWays <= stop; k += kWays)
#pragma GCC unroll 4
          for (int way = 0; way < kWays; ++way) use(k + way, way);
        for (; k < stop; ++k) use(k, 0);
      }
      group = block * 16 + stop;
    }
    for (int b = 0; b < Count; ++b) {
      for (int half = kWays / 2; half; half /= 2)
        for (int way = 0; way < half; ++way) sums[b][way] = add(sums[b][way], sums[b][way + half]);
      outputs[b * output_stride + row] = sum(sums[b][0]);
    }
  }
  for (int b = 0; b < Count; ++b) {  // an infinite or NaN input meets zeros too, as in the product with a dense matrix
    if (all_finite(inputs + b * stride, matrix.columns)) continue;
    for (std::int64_t row = first; row < last; ++row)
      outputs[b * output_stride + row] += skipped(matrix, row, inputs + b * stride);
  }
}

#if defined(__AVX512VNNI__)

constexpr std::int64_t kMostRounded = 16384;  // columns; beyond them inputs are not rounded

// The inputs of a vector, rounded, and for each sixteen of them their scale and the sum of what they have become. The
// codes of sixteen lie as the nibbles of a word do: first those of even numbers, then those of odd ones.
struct RoundedGroups {
  struct About {
    float scale, total;
  };
  alignas(64) std::int8_t codes[kMostRounded];
  About about[kMostRounded / 16];

  void fill(const float* inputs, std::int64_t columns) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (std::int64_t first = 0; first < columns; first += kRounded) {
      alignas(32) std::int8_t plain[kRounded];
      const float scale = round_inputs(inputs + first, plain);
      for (int half = 0; half < 2; ++half) {
        const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(plain + 16 * half));
        _mm_store_si128(reinterpret_cast<__m128i*>(codes + first + 16 * half), _mm_shuffle_epi8(sixteen, order));
        const std::int32_t total = _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(sixteen));
        about[first / 16 + half] = {scale, scale * static_cast<float>(total)};
      }
    }
  }
};

// What sixteen groups from a multiple of sixteen on need besides their codes, for vectors of a batch.
template <int Count>
struct CodeGrids {
  __m512 factors[Count];  // scale of the group times scale of its inputs
  __m512 middles[Count];  // −scale · zero · Σ inputs
  std::int64_t block = -1;

  void decode(const GroupRows& matrix, std::int64_t wanted, const RoundedGroups* inputs, Lanes table) {
    if (wanted == block) return;
    block = wanted;
    const Lanes steps = Float16::all(matrix.scales, wanted * 16);
    const Lanes zeros = multiply(multiply(steps, spread(-1.0f)), look_up(matrix.zeros[wanted], table));
    for (int b = 0; b < Count; ++b) {
      __m512 scales, totals;
      collect(inputs[b].about, matrix.places + wanted * 16, scales, totals);
      factors[b] = _mm512_mul_ps(steps.r, scales);
      middles[b] = _mm512_mul_ps(zeros.r, totals);
    }
  }

 private:
  // One by one, for the gathers of many processors are slower since they were made safe; and by loads that spread what
  // they find, for the unit that moves numbers between lanes has enough to do.
  static void collect(const RoundedGroups::About* about, const std::uint16_t* places, __m512& scales, __m512& totals) {
    const auto eight = [&](const std::uint16_t* from) {
      const auto one = [&](int k) { return _mm_load_sd(reinterpret_cast<const double*>(about + from[k])); };
      const auto four = [&](int k) {
        __m256d found = _mm256_broadcastsd_pd(one(k));
        found = _mm256_blend_pd(found, _mm256_broadcastsd_pd(one(k + 1)), 2);
        found = _mm256_blend_pd(found, _mm256_broadcastsd_pd(one(k + 2)), 4);
        return _mm256_blend_pd(found, _mm256_broadcastsd_pd(one(k + 3)), 8);
      };
      return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(four(0)), four(4), 1));
    };
    const __m512 low = eight(places), high = eight(places + 8);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    scales = _mm512_permutex2var_ps(low, even, high);
    totals = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  }
};

// As group_rows, for finite inputs, which are rounded to eight bits: four groups are 64 products of whole numbers in
// one instruction.
template <int Count>
void group_rows_of_codes(const GroupRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                         std::int64_t stride, float* outputs, std::int64_t output_stride) {
  RoundedGroups rounded[Count];
  for (int b = 0; b < Count; ++b) rounded[b].fill(inputs + b * stride, matrix.columns);
  const Lanes table = codes();
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i spreads = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  CodeGrids<Count> grids;
  for (std::int64_t row = first; row < last; ++row) {
    __m512 sums[Count][2], middles[Count];
    for (int b = 0; b < Count; ++b) sums[b][0] = sums[b][1] = middles[b] = _mm512_setzero_ps();
    const std::int64_t end = matrix.starts[row + 1];
    for (std::int64_t group = matrix.starts[row]; group < end;) {
      const std::int64_t block = group >> 4, left = end - block * 16;
      const int begin = static_cast<int>(group & 15), stop = left < 16 ? static_cast<int>(left) : 16;
      grids.decode(matrix, block, rounded, table);
      const std::uint32_t held = (1u << stop) - (1u << begin);
      for (int b = 0; b < Count; ++b)
        middles[b] = _mm512_mask_add_ps(middles[b], static_cast<__mmask16>(held), middles[b], grids.middles[b]);
      const auto use = [&](int quad, __m256i words) {
        const __m512i pairs = _mm512_cvtepu8_epi16(words);  // a byte of two codes becomes two bytes of one: (p | p · 16)
        const __m512i weights = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), low, 0xa8);  // & 15
        const __m512i lanes = _mm512_add_epi32(spreads, _mm512_set1_epi32(4 * quad));
        const std::uint16_t* places = matrix.places + block * 16 + 4 * quad;
        for (int b = 0; b < Count; ++b) {
          const auto sixteen = [&](int k) {
            const std::size_t at = places[k];
            return _mm_load_si128(reinterpret_cast<const __m128i*>(rounded[b].codes) + at);
          };
          __m512i x = _mm512_broadcast_i32x4(sixteen(0));
          x = _mm512_mask_broadcast_i32x4(x, 0x00f0, sixteen(1));
          x = _mm512_mask_broadcast_i32x4(x, 0x0f00, sixteen(2));
          x = _mm512_mask_broadcast_i32x4(x, 0xf000, sixteen(3));
          const __m512 dots = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, x));
          sums[b][quad % 2] =
              _mm512_fmadd_ps(dots, _mm512_permutexvar_ps(lanes, grids.factors[b]), sums[b][quad % 2]);
        }
      };
      const auto* words = matrix.words + block * 16;
      fetch(words, kAhead);
      fetch(words, kAhead + 64);
      if (held == 0xffffu) {
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; ++quad)
          use(quad, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 4 * quad)));
      } else {  // words of other rows count as zeros
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; ++quad)
          use(quad, _mm256_maskz_loadu_epi64(static_cast<__mmask8>(held >> 4 * quad & 15u), words + 4 * quad));
      }
      group = block * 16 + stop;
    }
    for (int b = 0; b < Count; ++b)
      outputs[b * output_stride + row] = sum({_mm512_add_ps(_mm512_add_ps(sums[b][0], sums[b][1]), middles[b])});
  }
}

#endif

void expand_group_rows(const GroupRows& matrix, std::int64_t first, std::int64_t last, float* target,
                       std::int64_t stride) {
  const Lanes table = codes();
  Grids grids;
  for (std::int64_t row = first; row < last; ++row) {
    float* line = target + (row - first) * stride;
    __builtin_memset(line, 0, sizeof(float) * static_cast<std::size_t>(matrix.columns));
    for (std::int64_t group = matrix.starts[row]; group < matrix.starts[row + 1]; ++group) {
      grids.decode(matrix, group >> 4, table);
      const Lanes weights = grids.weights(matrix.words[group], static_cast<int>(group & 15), table);
      const std::int64_t column = grids.columns[group & 15];
      if (column + 16 <= matrix.columns) {
        store(line + column, weights);
      } else {
        float last_ones[16];
        store(last_ones, weights);
        __builtin_memcpy(line + column, last_ones, sizeof(float) * static_cast<std::size_t>(matrix.columns - column));
      }
    }
  }
}
