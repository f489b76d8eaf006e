// Convolutions with sparse weights: ConvolutionBlocks against a strip of positions.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library.
//
// Positions lie side by side in memory and are the lanes; a strip of them stays in registers while one block of output
// channels goes through the input channels that it keeps. A vector of inputs that has been loaded serves all channels
// of the block. Elsen, Dukhan, Gale and Simonyan, 2020, arXiv 1911.09723, section 3.

// A NaN passes both: they return their second argument if one is NaN.
#if defined(__AVX512F__)
inline Lanes at_least(Lanes bound, Lanes a) { return {_mm512_max_ps(bound.r, a.r)}; }
inline Lanes at_most(Lanes bound, Lanes a) { return {_mm512_min_ps(bound.r, a.r)}; }
inline void store_first(float* target, Lanes a, int count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), a.r);
}
#elif defined(__AVX2__)
inline Lanes at_least(Lanes bound, Lanes a) {
  return {{_mm256_max_ps(bound.r[0], a.r[0]), _mm256_max_ps(bound.r[1], a.r[1])}};
}
inline Lanes at_most(Lanes bound, Lanes a) {
  return {{_mm256_min_ps(bound.r[0], a.r[0]), _mm256_min_ps(bound.r[1], a.r[1])}};
}
#else
inline Lanes at_least(Lanes bound, Lanes a) {
  for (int i = 0; i < 16; ++i) a.r[i] = bound.r[i] > a.r[i] ? bound.r[i] : a.r[i];
  return a;
}
inline Lanes at_most(Lanes bound, Lanes a) {
  for (int i = 0; i < 16; ++i) a.r[i] = bound.r[i] < a.r[i] ? bound.r[i] : a.r[i];
  return a;
}
#endif

#if !defined(__AVX512F__)
inline void store_first(float* target, Lanes a, int count) {
  if (count == 16) return store(target, a);
  float all[16];
  store(all, a);
  __builtin_memcpy(target, all, sizeof(float) * static_cast<std::size_t>(count));
}
#endif

// Write one output channel of a strip to the places of its positions.
template <int Vectors>
inline void put(const Strip& strip, std::int64_t channel, const Lanes (&sums)[Vectors]) {
  float* there = strip.outputs + channel * strip.output_stride;
  if (strip.run_count == 1) {
    const Run& one = strip.runs[0];
    const auto left = static_cast<int>(one.length - (Vectors - 1) * 16);
    if (one.from == 0 && left > 0) {
      for (int v = 0; v < Vectors - 1; ++v) store(there + one.to + 16 * v, sums[v]);
      store_first(there + one.to + 16 * (Vectors - 1), sums[Vectors - 1], left);
      return;
    }
  }
  float all[Vectors * 16];
  for (int v = 0; v < Vectors; ++v) store(all + 16 * v, sums[v]);
  for (int run = 0; run < strip.run_count; ++run) {
    const Run& one = strip.runs[run];
    __builtin_memcpy(there + one.to, all + one.from, sizeof(float) * static_cast<std::size_t>(one.length));
  }
}

// `Part` channels of a block of `Block` are summed at a time, as many as registers allow. `Taps` is 0 if kernels
// are larger than 1 × 1. `Whole`: zeros are multiplied as well, since an input is infinite or NaN; then `Block` is 0,
// because that is rare and blocks of any size may share the code.
template <int Block, int Part, int Vectors, int Taps, bool Whole>
void convolve(const ConvolutionBlocks& matrix, std::int64_t first, std::int64_t last, const Strip& strip) {
  // additions to one sum wait for each other: eight sums keep two units busy
  constexpr int kWays = Whole || Part * Vectors >= 8 ? 1 : 8 / (Part * Vectors);
  const int taps = Taps ? Taps : matrix.taps, size = Block ? Block : matrix.block;
  const std::int64_t stride = strip.stride;
  const std::int64_t* offsets = strip.taps;
  const std::int32_t* places = matrix.places;
  const std::int64_t skipped = matrix.skipped;
  const Lanes low = spread(matrix.low), high = spread(matrix.high);
  for (std::int64_t block = first; block < last; ++block)
    for (int part = 0; part < size; part += Part) {
      Lanes sums[kWays][Part][Vectors];
      for (int way = 0; way < kWays; ++way)
        for (int c = 0; c < Part; ++c)
          for (int v = 0; v < Vectors; ++v)
            sums[way][c][v] = way || !matrix.bias ? zero() : spread(matrix.bias[block * size + part + c]);
      const auto use = [&](std::int64_t kept, int way) {
        const float* inputs = strip.inputs + static_cast<std::int64_t>(places[kept]) * stride;
        const float* weights = matrix.values + (kept - skipped) * taps * size + part;
        for (int tap = 0; tap < taps; ++tap, weights += size) {
          const float* there = Taps == 1 ? inputs : inputs + offsets[tap];
          __asm__("" : "+r"(there));  // one address: with an index besides, load and product are not one operation
          Lanes x[Vectors];
          for (int v = 0; v < Vectors; ++v) x[v] = load(there + 16 * v);
          for (int c = 0; c < Part; ++c) {
            const Lanes weight = spread(weights[c]);
            for (int v = 0; v < Vectors; ++v) sums[way][c][v] = multiply_add(weight, x[v], sums[way][c][v]);
          }
        }
      };
      std::int64_t kept = matrix.starts[block];
      const std::int64_t end = matrix.starts[block + 1];
      if (Whole) {
        for (std::int64_t channel = 0; channel < matrix.inputs; ++channel) {
          if (kept < end && places[kept] == channel) {
            use(kept++, 0);
            continue;
          }
          for (int tap = 0; tap < taps; ++tap)
            for (int v = 0; v < Vectors; ++v) {
              const Lanes x = load(strip.inputs + channel * stride + offsets[tap] + 16 * v);
              for (int c = 0; c < Part; ++c) sums[0][c][v] = multiply_add(zero(), x, sums[0][c][v]);
            }
        }
      }
      for (; kept + kWays <= end; kept += kWays)
        for (int way = 0; way < kWays; ++way) use(kept + way, way);
      for (; kept < end; ++kept) use(kept, 0);
      for (int half = kWays / 2; half; half /= 2)
        for (int way = 0; way < half; ++way)
          for (int c = 0; c < Part; ++c)
            for (int v = 0; v < Vectors; ++v) sums[way][c][v] = add(sums[way][c][v], sums[way + half][c][v]);
      for (int c = 0; c < Part && block * size + part + c < matrix.outputs; ++c) {
        for (int v = 0; v < Vectors; ++v) sums[0][c][v] = at_most(high, at_least(low, sums[0][c][v]));
        put<Vectors>(strip, block * size + part + c, sums[0][c]);
      }
    }
}

#if defined(__AVX512F__)
constexpr int kSums = 24;  // vectors of sums that fit into registers, beside the inputs and a weight
#else
constexpr int kSums = 6;
#endif

// As many of the channels of a block, at most eight, as leave room for a strip of this width.
constexpr int part_of(int block, int vectors) {
  int part = block < 8 ? block : 8;
  while (part > 1 && part * vectors > kSums) part /= 2;
  return part;
}

template <int Block, int Vectors>
void convolve_strip(const ConvolutionBlocks& matrix, std::int64_t first, std::int64_t last, const Strip& strip) {
  constexpr int kPart = part_of(Block, Vectors);
  if (strip.whole) convolve<0, 1, Vectors, 0, true>(matrix, first, last, strip);
  else if (matrix.taps == 1) convolve<Block, kPart, Vectors, 1, false>(matrix, first, last, strip);
  else convolve<Block, kPart, Vectors, 0, false>(matrix, first, last, strip);
}

// Strips of blocks of 8 and 16 have at most three vectors, those of 2 and 4 at most six.
template <int Block>
void convolve_width(const ConvolutionBlocks& matrix, std::int64_t first, std::int64_t last, const Strip& strip) {
  if (strip.vectors == 1) return convolve_strip<Block, 1>(matrix, first, last, strip);
  if (strip.vectors == 2) return convolve_strip<Block, 2>(matrix, first, last, strip);
  if (Block > 4 || strip.vectors == 3) return convolve_strip<Block, 3>(matrix, first, last, strip);
  if constexpr (Block <= 4) {
    if (strip.vectors == 4) return convolve_strip<Block, 4>(matrix, first, last, strip);
    if (Block > 1 || strip.vectors == 6) return convolve_strip<Block, 6>(matrix, first, last, strip);
    if constexpr (Block == 1) convolve_strip<1, 8>(matrix, first, last, strip);
  }
}

void convolve_blocks(const ConvolutionBlocks& matrix, std::int64_t first, std::int64_t last, const Strip& strip) {
  switch (matrix.block) {
    case 1: return convolve_width<1>(matrix, first, last, strip);
    case 2: return convolve_width<2>(matrix, first, last, strip);
    case 4: return convolve_width<4>(matrix, first, last, strip);
    case 8: return convolve_width<8>(matrix, first, last, strip);
    default: return convolve_width<16>(matrix, first, last, strip);
  }
}

void widen_halves(const std::uint16_t* source, float* target, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(target + i, Float16::all(source, i));
  for (; i < count; ++i) target[i] = half_to_float(source[i]);
}

// Weights in float16 become floats block by block, in the nearest cache: what is read from afar is half as much.
void convolution(const ConvolutionBlocks& matrix, std::int64_t first, std::int64_t last, const Strip& strip) {
  if (!matrix.halves) return convolve_blocks(matrix, first, last, strip);
  ConvolutionBlocks wide = matrix;
  wide.values = strip.weights;
  const std::int64_t size = static_cast<std::int64_t>(matrix.taps) * matrix.block;
  for (std::int64_t block = first; block < last; ++block) {
    wide.skipped = matrix.starts[block];
    widen_halves(matrix.halves + wide.skipped * size, strip.weights, (matrix.starts[block + 1] - wide.skipped) * size);
    convolve_blocks(wide, block, block + 1, strip);
  }
}

template <int Vectors>
bool gather_vectors(const float* source, std::int64_t stride, float* target, std::int64_t channels) {
  Lanes totals[Vectors];
  for (Lanes& total : totals) total = zero();
  for (std::int64_t channel = 0; channel < channels; ++channel, source += stride, target += Vectors * 16)
    for (int v = 0; v < Vectors; ++v) {
      __builtin_prefetch(source + (Vectors + v) * 16, 0, 2);  // the next strip: too many streams for the processor
      const Lanes x = load(source + 16 * v);
      store(target + 16 * v, x);
      totals[v] = multiply_add(zero(), x, totals[v]);
    }
  for (int v = 1; v < Vectors; ++v) totals[0] = add(totals[0], totals[v]);
  return sum(totals[0]) == 0.0f;
}

// Copy `length` inputs of every channel, which are `stride` apart, to lines of `width`; false if one of them is
// infinite or NaN.
bool gather(const float* source, std::int64_t stride, float* target, std::int64_t width, std::int64_t length,
            std::int64_t channels) {
  if (length == width) switch (width / 16) {
      case 1: return gather_vectors<1>(source, stride, target, channels);
      case 2: return gather_vectors<2>(source, stride, target, channels);
      case 3: return gather_vectors<3>(source, stride, target, channels);
      case 4: return gather_vectors<4>(source, stride, target, channels);
      case 6: return gather_vectors<6>(source, stride, target, channels);
      case 8: return gather_vectors<8>(source, stride, target, channels);
      default: break;
    }
  Lanes total = zero();
  float rest = 0.0f;
  for (std::int64_t channel = 0; channel < channels; ++channel, source += stride, target += width) {
    std::int64_t i = 0;
    for (; i + 16 <= length; i += 16) {
      const Lanes x = load(source + i);
      store(target + i, x);
      total = multiply_add(zero(), x, total);
    }
    for (; i < length; ++i) {
      target[i] = source[i];
      rest += 0.0f * source[i];
    }
  }
  return sum(total) + rest == 0.0f;
}

// Up to sixteen floats, and nothing beside them; `copy_second` takes every other one. Both return zeros, or NaN for what
// is not finite.
#if defined(__AVX512F__)
inline Lanes copy_first(const float* source, float* target, int count) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const Lanes found{_mm512_maskz_loadu_ps(mask, source)};
  _mm512_mask_storeu_ps(target, mask, found.r);
  return multiply(zero(), found);
}
inline Lanes copy_second(const float* source, float* target, int count) {
  const auto low = static_cast<__mmask16>(count > 8 ? 0xffffu : (1u << (2 * count - 1)) - 1);
  const auto high = static_cast<__mmask16>(count > 8 ? (1u << (2 * count - 17)) - 1 : 0u);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Lanes found{_mm512_permutex2var_ps(_mm512_maskz_loadu_ps(low, source), even,
                                           _mm512_maskz_loadu_ps(high, source + 16))};
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1), found.r);
  return multiply(zero(), found);
}
#else
inline Lanes copy_first(const float* source, float* target, int count) {
  float total = 0.0f;
  for (int i = 0; i < count; ++i) total += 0.0f * (target[i] = source[i]);
  return spread(total);
}
inline Lanes copy_second(const float* source, float* target, int count) {
  float total = 0.0f;
  for (int i = 0; i < count; ++i) total += 0.0f * (target[i] = source[2 * i]);
  return spread(total);
}
#endif

// Copy short rows: `from` of a run is its place in the source, where its values are `step` apart; false if one of them
// is infinite or NaN.
bool copy_runs(const Run* runs, std::int64_t count, std::int64_t step, const float* source, float* target) {
  Lanes total = zero();
  float rest = 0.0f;
  for (const Run* run = runs; run < runs + count; ++run) {
    const float* from = source + run->from;
    float* to = target + run->to;
    std::int64_t i = 0;
    if (step == 1) {
      for (; i + 16 <= run->length; i += 16) {
        const Lanes x = load(from + i);
        store(to + i, x);
        total = multiply_add(zero(), x, total);
      }
      if (i < run->length) total = add(total, copy_first(from + i, to + i, static_cast<int>(run->length - i)));
    } else if (step == 2) {
      for (; i < run->length; i += 16) {
        const std::int64_t left = run->length - i;
        total = add(total, copy_second(from + 2 * i, to + i, static_cast<int>(left < 16 ? left : 16)));
      }
    } else {
      for (; i < run->length; ++i) rest += 0.0f * (to[i] = from[step * i]);
    }
  }
  return sum(total) + rest == 0.0f;
}

template <int Taps, int Vectors>
inline void depthwise_strip(const Plane& plane, std::int64_t position, float* outputs) {
  const int taps = Taps ? Taps : plane.count;
  Lanes sums[Vectors];
  for (Lanes& one : sums) one = spread(plane.bias);
  for (int tap = 0; tap < taps; ++tap) {
    const float* there = plane.inputs + plane.taps[tap] + position;
    const Lanes weight = spread(plane.weights[tap]);
    for (int v = 0; v < Vectors; ++v) sums[v] = multiply_add(weight, load(there + 16 * v), sums[v]);
  }
  const Lanes low = spread(plane.low), high = spread(plane.high);
  for (int v = 0; v < Vectors; ++v) store(outputs + position + 16 * v, at_most(high, at_least(low, sums[v])));
}

template <int Taps>
void depthwise_taps(const Plane& plane, std::int64_t positions, float* outputs) {
  std::int64_t position = 0;
  for (; position + 48 < positions; position += 64) depthwise_strip<Taps, 4>(plane, position, outputs);
  for (; position < positions; position += 16) depthwise_strip<Taps, 1>(plane, position, outputs);
}

void depthwise(const Plane& plane, std::int64_t positions, float* outputs) {
  if (plane.count == 9) return depthwise_taps<9>(plane, positions, outputs);
  if (plane.count == 25) return depthwise_taps<25>(plane, positions, outputs);
  depthwise_taps<0>(plane, positions, outputs);
}
