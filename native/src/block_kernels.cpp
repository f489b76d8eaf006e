// Products with matrices of which single weights or blocks of one column are kept: BlockRows.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.
//
// Few vectors: sixteen stored weights are sixteen lanes, whatever the height of a block; a block of sixteen needs one
// input in all lanes, a single weight one of its own. Many vectors: sixteen of them are the lanes, and each stored
// weight is one in all of them; nothing is wasted on zeros, however few weights are left.

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#if defined(__AVX2__)
constexpr int kUnrolled = 16;
#else
constexpr int kUnrolled = 1;  // lanes are loops themselves, and the compiler would be at it for minutes
#endif

// The inputs that sixteen adjacent stored weights meet.
template <typename Place, int Height>
struct Met {
  static Lanes inputs(const float* x, const Place* places) {
    alignas(64) float found[16];
    for (int i = 0; i < 16; ++i) found[i] = x[places[i / Height]];
    return load(found);
  }
};
template <typename Place>
struct Met<Place, 16> {
  static Lanes inputs(const float* x, const Place* places) { return spread(x[places[0]]); }
};

#if defined(__AVX512F__)

template <typename Place>
struct Met<Place, 8> {
  static Lanes inputs(const float* x, const Place* places) {
    return {_mm512_mask_broadcastss_ps(_mm512_set1_ps(x[places[0]]), 0xff00, _mm_load_ss(x + places[1]))};
  }
};
template <typename Place>
struct Met<Place, 4> {
  static Lanes inputs(const float* x, const Place* places) {
    __m512 found = _mm512_set1_ps(x[places[0]]);
    found = _mm512_mask_broadcastss_ps(found, 0x00f0, _mm_load_ss(x + places[1]));
    found = _mm512_mask_broadcastss_ps(found, 0x0f00, _mm_load_ss(x + places[2]));
    return {_mm512_mask_broadcastss_ps(found, 0xf000, _mm_load_ss(x + places[3]))};
  }
};
// Number by number: gathers have been slower than that since they were made safe.
template <typename Place>
struct Met<Place, 1> {
  static Lanes inputs(const float* x, const Place* places) {
    const auto eight = [&](int i) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(four(x, places + i)), four(x, places + i + 4), 1);
    };
    return {_mm512_insertf32x8(_mm512_castps256_ps512(eight(0)), eight(8), 1)};
  }

 private:
  static __m128 four(const float* x, const Place* places) {
    const __m128 two = _mm_insert_ps(_mm_load_ss(x + places[0]), _mm_load_ss(x + places[1]), 0x10);
    return _mm_insert_ps(_mm_insert_ps(two, _mm_load_ss(x + places[2]), 0x20), _mm_load_ss(x + places[3]), 0x30);
  }
};

#elif defined(__AVX2__)

template <typename Place>
struct Met<Place, 8> {
  static Lanes inputs(const float* x, const Place* places) {
    return {{_mm256_broadcast_ss(x + places[0]), _mm256_broadcast_ss(x + places[1])}};
  }
};
template <typename Place>
struct Met<Place, 4> {
  static Lanes inputs(const float* x, const Place* places) {
    const auto two = [&](int i) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(x + places[i])),
                                  _mm_broadcast_ss(x + places[i + 1]), 1);
    };
    return {{two(0), two(2)}};
  }
};

#endif

// Sums of 16 / Height blocks, lane by lane, as the sums of a band: its first `Height` numbers.
template <int Height>
inline void fold(Lanes lanes, float* sums) {
  if (Height == 1) {
    sums[0] = sum(lanes);
    return;
  }
  store(sums, lanes);
  for (int half = 8; half >= Height; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
}

template <typename Value>
inline float one_value(const void* values, std::int64_t i) {
  alignas(64) float found[16];
  store(found, Value::all(values, i));
  return found[0];
}

// One row as a dense product would compute it: an infinite or NaN input meets zeros, too.
template <typename Value, typename Place, int Height>
float dense_row(const BlockRows& matrix, std::int64_t row, const float* inputs) {
  const auto* places = static_cast<const Place*>(matrix.places);
  const std::int64_t band = row / Height, end = matrix.starts[band + 1];
  std::int64_t next = matrix.starts[band];
  float total = 0.0f;
  for (std::int64_t column = 0; column < matrix.columns; ++column) {
    const bool kept = next < end && places[next] == column;
    total += inputs[column] * (kept ? one_value<Value>(matrix.values, next++ * Height + row % Height) : 0.0f);
  }
  return matrix.scales ? total * matrix.scales[row] : total;
}

template <typename Value, typename Place, int Height, int Count>
void few_block_rows(const BlockRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                    std::int64_t stride, float* outputs, std::int64_t output_stride) {
  constexpr int kBlocks = 16 / Height;            // of sixteen weights
  constexpr int kWays = Count == 1 ? 4 : 2;  // sums of one vector, so that additions need not wait for each other
  const auto* places = static_cast<const Place*>(matrix.places);
  for (std::int64_t row = first; row < last; row += Height) {
    std::int64_t block = matrix.starts[row / Height];
    const std::int64_t end = matrix.starts[row / Height + 1];
    Lanes sums[Count][kWays];
    for (auto& ways : sums)
      for (Lanes& way : ways) way = zero();
    const auto use = [&](std::int64_t k, Lanes weights, int way) {
      for (int b = 0; b < Count; ++b)
        sums[b][way] = multiply_add(weights, Met<Place, Height>::inputs(inputs + b * stride, places + k), sums[b][way]);
    };
    for (; block + kWays * kBlocks <= end; block += kWays * kBlocks) {
      fetch(matrix.values, block * Height * kBits<Value> / 8 + kAhead);
      if (kBits<Value> > 8) fetch(matrix.values, block * Height * kBits<Value> / 8 + kAhead + 64);
#pragma GCC unroll kUnrolled
      for (int way = 0; way < kWays; ++way) {
        const std::int64_t k = block + way * kBlocks;
        use(k, Value::all(matrix.values, k * Height), way);
      }
    }
    for (; block + kBlocks <= end; block += kBlocks) use(block, Value::all(matrix.values, block * Height), 0);
    if (block < end) {  // what follows belongs to the next band
      const auto left = static_cast<int>(end - block) * Height;
      use(block, place(Value::all(matrix.values, block * Height), (1u << left) - 1), 1);
    }
    const std::int64_t there = last - row < Height ? last - row : Height;
    for (int b = 0; b < Count; ++b) {
      for (int half = kWays / 2; half; half /= 2)
        for (int way = 0; way < half; ++way) sums[b][way] = add(sums[b][way], sums[b][way + half]);
      alignas(64) float found[16];
      fold<Height>(sums[b][0], found);
      for (std::int64_t i = 0; i < there; ++i)
        outputs[b * output_stride + row + i] = matrix.scales ? found[i] * matrix.scales[row + i] : found[i];
    }
  }
  for (int b = 0; b < Count; ++b) {
    if (all_finite(inputs + b * stride, matrix.columns)) continue;
    for (std::int64_t row = first; row < last; ++row)
      outputs[b * output_stride + row] = dense_row<Value, Place, Height>(matrix, row, inputs + b * stride);
  }
}

// Sixteen lines of sixteen numbers, each `stride` apart, become columns.
static inline void cross_sixteen(const float* from, std::int64_t stride, float* to, std::int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto pairs = [](__m512 low, __m512 high, bool upper) {
    const __m512d x = _mm512_castps_pd(low), y = _mm512_castps_pd(high);
    return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int i = 0; i < 16; i += 4)  // a[i + j] then holds column 4 · lane + j of four lines in each of its lanes
    for (int j = 0; j < 4; ++j) a[i + j] = pairs(b[i + j / 2], b[i + 2 + j / 2], j % 2);
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 2; ++i) {
      b[8 * i + j] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + 4 + j], 0x88);
      b[8 * i + 4 + j] = _mm512_shuffle_f32x4(a[8 * i + j], a[8 * i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * stride + j];
#endif
}

void cross_vectors(const Inputs& inputs, std::int64_t first, std::int64_t last, float* target, int lines) {
  const std::int64_t width = 16 * lines;
  for (std::int64_t column = first; column < last; column += 16)
    for (int line = 0; line < lines; ++line) {
      const float* from = inputs.data + 16 * line * inputs.stride + column;
      float* to = target + column * width + 16 * line;
      const int there = inputs.count - 16 * line;
      if (there >= 16) {
        cross_sixteen(from, inputs.stride, to, width);
        continue;
      }
      alignas(64) float tile[16 * 16];
      for (int i = 0; i < 16; ++i) store(tile + 16 * i, i < there ? load(from + i * inputs.stride) : zero());
      cross_sixteen(tile, 16, to, width);
    }
}

template <typename Value, typename Place, int Height, int Lines>
void many_block_rows(const BlockRows& matrix, std::int64_t first, std::int64_t last, const Crossed& inputs,
                     const Outputs& outputs) {
  constexpr int kBlocks = 16 / Height, kWidth = 16 * Lines;
  constexpr int kWays = Height * Lines >= 4 ? 1 : 4 / (Height * Lines);
  const auto* places = static_cast<const Place*>(matrix.places);
  alignas(64) float tile[16 * kWidth];
  alignas(64) float crossed[16 * 16];
  alignas(64) float weights[16];
  for (std::int64_t panel = first; panel < last; panel += 16) {
    const std::int64_t stop = last - panel < 16 ? last : panel + 16;
    for (std::int64_t row = panel; row < stop; row += Height) {
      Lanes sums[kWays][Height][Lines];
      for (auto& way : sums)
        for (auto& lines : way)
          for (Lanes& one : lines) one = zero();
      const auto use = [&](std::int64_t block, int within, int way) {
        const float* there = inputs.data + static_cast<std::int64_t>(places[block]) * kWidth;
        for (int line = 0; line < Lines; ++line) {
          const Lanes x = load(there + 16 * line);
          for (int h = 0; h < Height; ++h)
            sums[way][h][line] = multiply_add(spread(weights[within * Height + h]), x, sums[way][h][line]);
        }
      };
      std::int64_t block = matrix.starts[row / Height];
      const std::int64_t end = matrix.starts[row / Height + 1];
      for (; block + kBlocks <= end; block += kBlocks) {
        store(weights, Value::all(matrix.values, block * Height));
#pragma GCC unroll kUnrolled
        for (int k = 0; k < kBlocks; ++k) use(block + k, k, k % kWays);
      }
      if (block < end) {
        store(weights, Value::all(matrix.values, block * Height));
        for (int k = 0; block + k < end; ++k) use(block + k, k, 0);
      }
      for (int h = 0; h < Height; ++h)
        for (int line = 0; line < Lines; ++line) {
          for (int half = kWays / 2; half; half /= 2)
            for (int way = 0; way < half; ++way)
              sums[way][h][line] = add(sums[way][h][line], sums[way + half][h][line]);
          store(tile + (row - panel + h) * kWidth + 16 * line, sums[0][h][line]);
        }
    }
    if (matrix.scales)
      for (std::int64_t row = panel; row < stop; ++row)
        for (int line = 0; line < Lines; ++line) {
          float* there = tile + (row - panel) * kWidth + 16 * line;
          store(there, multiply(load(there), spread(matrix.scales[row])));
        }
    for (int line = 0; line < Lines; ++line) {
      cross_sixteen(tile + 16 * line, kWidth, crossed, 16);
      for (int b = 0; b < 16 && 16 * line + b < inputs.count; ++b)
        __builtin_memcpy(outputs.data + (16 * line + b) * outputs.stride + panel, crossed + 16 * b,
                         sizeof(float) * static_cast<std::size_t>(stop - panel));
    }
  }
}

template <typename Value, typename Place, int Height>
void expand_block_rows(const BlockRows& matrix, std::int64_t first, std::int64_t last, float* target,
                       std::int64_t stride) {
  const auto* places = static_cast<const Place*>(matrix.places);
  for (std::int64_t row = first; row < last; ++row) {
    float* line = target + (row - first) * stride;
    const float scale = matrix.scales ? matrix.scales[row] : 1.0f;
    __builtin_memset(line, 0, sizeof(float) * static_cast<std::size_t>(matrix.columns));
    for (std::int64_t block = matrix.starts[row / Height]; block < matrix.starts[row / Height + 1]; ++block)
      line[places[block]] = one_value<Value>(matrix.values, block * Height + row % Height) * scale;
  }
}

// ------------------------------------------------------------------------------------------------ choosing

template <typename Value, typename Place, int Height>
struct BlocksOf {
  static void few(const BlockRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs,
                  const Outputs& outputs) {
    int b = 0;
    if (Height > 1)  // gathers are what single weights take, and these are for each vector
      for (; b + 4 <= inputs.count; b += 4)
        few_block_rows<Value, Place, Height, 4>(m, first, last, inputs.data + b * inputs.stride, inputs.stride,
                                                outputs.data + b * outputs.stride, outputs.stride);
    for (; b < inputs.count; ++b)
      few_block_rows<Value, Place, Height, 1>(m, first, last, inputs.data + b * inputs.stride, inputs.stride,
                                              outputs.data + b * outputs.stride, outputs.stride);
  }

  static void many([[maybe_unused]] const BlockRows& m, [[maybe_unused]] std::int64_t first,
                   [[maybe_unused]] std::int64_t last, [[maybe_unused]] const Crossed& inputs,
                   [[maybe_unused]] const Outputs& outputs) {
    if constexpr (most_lines(Height) >= 1)
      if (inputs.lines == 1) return many_block_rows<Value, Place, Height, 1>(m, first, last, inputs, outputs);
    if constexpr (most_lines(Height) >= 2)
      if (inputs.lines == 2) return many_block_rows<Value, Place, Height, 2>(m, first, last, inputs, outputs);
    if constexpr (most_lines(Height) >= 4) many_block_rows<Value, Place, Height, 4>(m, first, last, inputs, outputs);
  }

  static void expand(const BlockRows& m, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
    expand_block_rows<Value, Place, Height>(m, first, last, target, stride);
  }
};

// use(one of the structures above), whichever the matrix takes
template <typename Use>
void with_blocks(const BlockRows& m, Use&& use) {
  const auto of_height = [&](auto value, auto place) {
    using V = decltype(value);
    using P = decltype(place);
    switch (m.height) {
      case 16: return use(BlocksOf<V, P, 16>{});
      case 8: return use(BlocksOf<V, P, 8>{});
      case 4: return use(BlocksOf<V, P, 4>{});
      default: return use(BlocksOf<V, P, 1>{});
    }
  };
  const auto of_value = [&](auto place) {
    switch (m.value) {
      case Value::bfloat16: return of_height(BFloat16{}, place);
      case Value::int8: return of_height(Int8{}, place);
      default: return of_height(Float32{}, place);
    }
  };
  if (m.wide) of_value(std::int32_t{});
  else of_value(std::uint16_t{});
}

void few_blocks(const BlockRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs,
                const Outputs& outputs) {
  with_blocks(m, [&](auto kernels) { kernels.few(m, first, last, inputs, outputs); });
}

void many_blocks(const BlockRows& m, std::int64_t first, std::int64_t last, const Crossed& inputs,
                 const Outputs& outputs) {
  with_blocks(m, [&](auto kernels) { kernels.many(m, first, last, inputs, outputs); });
}

void expand_blocks(const BlockRows& m, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
  with_blocks(m, [&](auto kernels) { kernels.expand(m, first, last, target, stride); });
}

}  // namespace

const BlockKernels& block_table() {
  static const BlockKernels kernels = {few_blocks, many_blocks, expand_blocks, cross_vectors, all_finite};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
