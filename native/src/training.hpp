// Products with matrices of which only the non-zeros exist, for training: many vectors at a time.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library.
//
// Positions of the batch are the lanes: a tile of 64 of them is turned so that every feature lies together, and stays
// in the second cache while all rows go through it. A non-zero is one broadcast and four products with what is loaded.
// After Elsen, Dukhan, Gale and Simonyan, 2020, arXiv 1911.09723, section 3; the gradient of the non-zeros is the
// sampled product of Gale, Zaharia, Young and Elsen, 2020, arXiv 2006.10901, section 6, in the same layout.

// ------------------------------------------------------------------------------------------------ turning

// target[i][j] = source[j][i] for sixteen of each; strides in floats. `Streamed`: every row of the target is a cache
// line, which goes to memory and does not displace what is in use.
#if defined(__AVX512F__)
template <bool Streamed>
inline void turn(const float* source, std::int64_t source_stride, float* target, std::int64_t target_stride) {
  __m512 a[16], b[16];
  // the first of two exchanges, of blocks of four by four, is done by loading
  for (int i = 0; i < 4; ++i)
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float* from = source + 4 * quarter;
      __m512 row = _mm512_castps128_ps512(_mm_loadu_ps(from + i * source_stride));
      row = _mm512_insertf32x4(row, _mm_loadu_ps(from + (i + 4) * source_stride), 1);
      row = _mm512_insertf32x4(row, _mm_loadu_ps(from + (i + 8) * source_stride), 2);
      a[4 * quarter + i] = _mm512_insertf32x4(row, _mm_loadu_ps(from + (i + 12) * source_stride), 3);
    }
  for (int quarter = 0; quarter < 4; ++quarter) {
    const __m512* rows = a + 4 * quarter;
    const __m512 low01 = _mm512_unpacklo_ps(rows[0], rows[1]), high01 = _mm512_unpackhi_ps(rows[0], rows[1]);
    const __m512 low23 = _mm512_unpacklo_ps(rows[2], rows[3]), high23 = _mm512_unpackhi_ps(rows[2], rows[3]);
    const auto join = [](__m512 x, __m512 y, bool high) {
      const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
      return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
    };
    b[4 * quarter] = join(low01, low23, false);
    b[4 * quarter + 1] = join(low01, low23, true);
    b[4 * quarter + 2] = join(high01, high23, false);
    b[4 * quarter + 3] = join(high01, high23, true);
  }
  for (int i = 0; i < 16; ++i) {
    if (Streamed) _mm512_stream_ps(target + i * target_stride, b[i]);
    else _mm512_storeu_ps(target + i * target_stride, b[i]);
  }
}
inline void finish_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
template <bool Streamed>
inline void turn(const float* source, std::int64_t source_stride, float* target, std::int64_t target_stride) {
  for (int down = 0; down < 16; down += 8)
    for (int right = 0; right < 16; right += 8) {
      const float* from = source + down * source_stride + right;
      float* to = target + right * target_stride + down;
      __m256 a[8];
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
          const __m128 low = _mm_loadu_ps(from + i * source_stride + 4 * half);
          a[4 * half + i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low),
                                                 _mm_loadu_ps(from + (i + 4) * source_stride + 4 * half), 1);
        }
      for (int half = 0; half < 2; ++half) {
        const __m256* rows = a + 4 * half;
        const __m256 low01 = _mm256_unpacklo_ps(rows[0], rows[1]), high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
        const __m256 low23 = _mm256_unpacklo_ps(rows[2], rows[3]), high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
        float* there = to + 4 * half * target_stride;
        _mm256_storeu_ps(there, _mm256_shuffle_ps(low01, low23, 0x44));
        _mm256_storeu_ps(there + target_stride, _mm256_shuffle_ps(low01, low23, 0xee));
        _mm256_storeu_ps(there + 2 * target_stride, _mm256_shuffle_ps(high01, high23, 0x44));
        _mm256_storeu_ps(there + 3 * target_stride, _mm256_shuffle_ps(high01, high23, 0xee));
      }
    }
}
#else
template <bool Streamed>
inline void turn(const float* source, std::int64_t source_stride, float* target, std::int64_t target_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) target[i * target_stride + j] = source[j * source_stride + i];
}
#endif
#if !defined(__AVX512F__)
inline void finish_streams() {}
#endif

inline void copy_floats(float* target, const float* source, std::int64_t count) {
  __builtin_memcpy(target, source, sizeof(float) * static_cast<std::size_t>(count));
}

// The same for `down` rows of `right` numbers each: of each number the first `written` of sixteen, or zeros, come out.
inline void turn_some(const float* source, std::int64_t source_stride, int down, int right, float* target,
                      std::int64_t target_stride, int written) {
  if (down == 16 && right == 16) return turn<false>(source, source_stride, target, target_stride);
  float before[256] = {}, after[256];
  for (int i = 0; i < down; ++i) copy_floats(before + 16 * i, source + i * source_stride, right);
  turn<false>(before, 16, after, 16);
  for (int i = 0; i < right; ++i) copy_floats(target + i * target_stride, after + 16 * i, written);
}

inline int padded(int count) { return (count + 15) / 16 * 16; }

void pack_tile(const Features& features, int count, std::int64_t first, std::int64_t last, float* tile) {
  const int line = padded(count);
  if (features.feature_stride != 1) {
    for (std::int64_t feature = first; feature < last; ++feature, tile += line) {
      copy_floats(tile, features.data + feature * features.feature_stride, count);
      for (int i = count; i < line; ++i) tile[i] = 0.0f;
    }
    return;
  }
  // sixteen lines at a time are read from one end to the other, which processors foresee
  for (int position = 0; position < count; position += 16) {
    const int down = count - position < 16 ? count - position : 16;
    const float* from = features.data + position * features.position_stride;
    float* to = tile + position;
    for (std::int64_t feature = first; feature < last; feature += 16, to += 16 * line) {
      const int right = last - feature < 16 ? static_cast<int>(last - feature) : 16;
      turn_some(from + feature, features.position_stride, down, right, to, line, 16);
    }
  }
}

// The other way round, for at most sixteen features that lie in a block of their own.
void unpack_tile(const float* tile, int count, std::int64_t feature, int features, const Features& target) {
  const int line = padded(count);
  auto* data = const_cast<float*>(target.data);
  if (target.feature_stride != 1) {
    for (int i = 0; i < features; ++i) copy_floats(data + (feature + i) * target.feature_stride, tile + i * line, count);
    return;
  }
  const bool lines = (reinterpret_cast<std::uintptr_t>(data + feature) & 63) == 0 && target.position_stride % 16 == 0;
  for (int position = 0; position < count; position += 16) {
    const int right = count - position < 16 ? count - position : 16;
    float* there = data + position * target.position_stride + feature;
    if (target.streamed && lines && features == 16 && right == 16)
      turn<true>(tile + position, line, there, target.position_stride);
    else
      turn_some(tile + position, line, features, right, there, target.position_stride, features);
  }
}

// ------------------------------------------------------------------------------------------------ products

template <int Vectors>
void multiply_rows(const SparseRows& matrix, std::int64_t first, std::int64_t last, const float* tile, int count,
                   const float* bias, const float* before, float* behind, const Features& target) {
  // additions to one sum wait for each other
  constexpr int kWays = Vectors >= 3 ? 1 : Vectors == 2 ? 2 : 4;
  constexpr int kLine = 16 * Vectors;
  alignas(64) float block[16 * kLine];
  for (std::int64_t group = first; group < last; group += 16) {
    const int rows = last - group < 16 ? static_cast<int>(last - group) : 16;
    for (int i = 0; i < rows; ++i) {
      const std::int64_t row = group + i;
      Lanes sums[kWays][Vectors];
      for (int way = 0; way < kWays; ++way)
        for (int v = 0; v < Vectors; ++v)
          sums[way][v] = way ? zero() : before ? load(before + row * kLine + 16 * v) : spread(bias ? bias[row] : 0.0f);
      const auto use = [&](std::int64_t kept, int way) {
        const float* there = tile + static_cast<std::size_t>(matrix.places[kept]) * kLine;
        __asm__("" : "+r"(there));  // one address: with an index besides, load and product are not one operation
        const Lanes weight = spread(matrix.values[kept]);
        for (int v = 0; v < Vectors; ++v) sums[way][v] = multiply_add(weight, load(there + 16 * v), sums[way][v]);
      };
      std::int64_t kept = matrix.starts[row];
      const std::int64_t end = matrix.starts[row + 1];
      for (; kept + kWays <= end; kept += kWays)
        for (int way = 0; way < kWays; ++way) use(kept + way, way);
      for (; kept < end; ++kept) use(kept, 0);
      for (int half = kWays / 2; half; half /= 2)
        for (int way = 0; way < half; ++way)
          for (int v = 0; v < Vectors; ++v) sums[way][v] = add(sums[way][v], sums[way + half][v]);
      float* to = behind ? behind + row * kLine : block + i * kLine;
      for (int v = 0; v < Vectors; ++v) store(to + 16 * v, sums[0][v]);
    }
    if (!behind) unpack_tile(block, count, group, rows, target);
  }
  if (target.streamed) finish_streams();
}

void multiply_tile(const SparseRows& matrix, std::int64_t first, std::int64_t last, const float* tile, int count,
                   const float* bias, const float* before, float* behind, const Features& target) {
  switch ((count + 15) / 16) {
    case 1: return multiply_rows<1>(matrix, first, last, tile, count, bias, before, behind, target);
    case 2: return multiply_rows<2>(matrix, first, last, tile, count, bias, before, behind, target);
    case 3: return multiply_rows<3>(matrix, first, last, tile, count, bias, before, behind, target);
    case 4: return multiply_rows<4>(matrix, first, last, tile, count, bias, before, behind, target);
  }
}

// ------------------------------------------------------------------------------------------------ gradient

// Add to each number the sum of one vector. Halves of two vectors are added as one, until a lane is left of each.
#if defined(__AVX512F__)
inline void add_eight(const Lanes (&a)[8], float* sums) {
  const auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  };
  const __m512 ab = fold(a[0].r, a[1].r), cd = fold(a[2].r, a[3].r);
  const __m512 ef = fold(a[4].r, a[5].r), gh = fold(a[6].r, a[7].r);
  // quarters of a, b, c, d
  const auto quarters = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  const __m512 abcd = quarters(ab, cd), efgh = quarters(ef, gh);
  const __m512 pairs = _mm512_add_ps(_mm512_unpacklo_ps(abcd, efgh), _mm512_unpackhi_ps(abcd, efgh));
  const __m512 all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
  // every quarter begins with a sum of its first four and one of its last four vectors
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m256 found = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), found));
}
#elif defined(__AVX2__)
inline void add_eight(const Lanes (&a)[8], float* sums) {
  __m256 b[8];
  for (int i = 0; i < 8; ++i) b[i] = _mm256_add_ps(a[i].r[0], a[i].r[1]);
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(b[0], b[1]), _mm256_hadd_ps(b[2], b[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(b[4], b[5]), _mm256_hadd_ps(b[6], b[7]));
  const __m256 found =
      _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), found));
}
#else
inline void add_eight(const Lanes (&a)[8], float* sums) {
  for (int i = 0; i < 8; ++i) sums[i] += sum(a[i]);
}
#endif

template <int Vectors>
void outer_rows(const SparseRows& matrix, std::int64_t first, std::int64_t last, const float* tile, int count,
                const Features& outputs, float* gradient, bool adding) {
  constexpr int kLine = 16 * Vectors;
  alignas(64) float block[16 * kLine];
  for (std::int64_t group = first; group < last; group += 16) {
    const int rows = last - group < 16 ? static_cast<int>(last - group) : 16;
    pack_tile(outputs, count, group, group + rows, block);
    for (int i = 0; i < rows; ++i) {
      Lanes output[Vectors];
      for (int v = 0; v < Vectors; ++v) output[v] = load(block + i * kLine + 16 * v);
      const auto product = [&](std::int64_t kept) {
        const float* there = tile + static_cast<std::size_t>(matrix.places[kept]) * kLine;
        __asm__("" : "+r"(there));
        Lanes found = multiply(output[0], load(there));
        for (int v = 1; v < Vectors; ++v) found = multiply_add(output[v], load(there + 16 * v), found);
        return found;
      };
      std::int64_t kept = matrix.starts[group + i];
      const std::int64_t end = matrix.starts[group + i + 1];
      float* to = gradient + kept;
      for (; kept + 8 <= end; kept += 8, to += 8) {
        Lanes products[8];
        for (int nth = 0; nth < 8; ++nth) products[nth] = product(kept + nth);
        if (!adding) __builtin_memset(to, 0, 8 * sizeof(float));
        add_eight(products, to);
      }
      for (; kept < end; ++kept, ++to) *to = sum(product(kept)) + (adding ? *to : 0.0f);
    }
  }
}

void outer_tile(const SparseRows& matrix, std::int64_t first, std::int64_t last, const float* tile, int count,
                const Features& outputs, float* gradient, bool adding) {
  switch ((count + 15) / 16) {
    case 1: return outer_rows<1>(matrix, first, last, tile, count, outputs, gradient, adding);
    case 2: return outer_rows<2>(matrix, first, last, tile, count, outputs, gradient, adding);
    case 3: return outer_rows<3>(matrix, first, last, tile, count, outputs, gradient, adding);
    case 4: return outer_rows<4>(matrix, first, last, tile, count, outputs, gradient, adding);
  }
}
