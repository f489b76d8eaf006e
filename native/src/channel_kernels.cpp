// Products in which only some channels take part: ChannelLines.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.
//
// A few lines are gone through together, so that a sum in the first-level cache is loaded and stored once for all of
// them. Every sum adds its terms in the order of the channels, however outputs are divided among threads and lines are
// taken together. What is read next is known from the list of channels, and asked for before.

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

constexpr std::int64_t kStep = 32;     // outputs that are worked on at a time
constexpr std::int64_t kSums = 4096;   // of outputs that stay in the first-level cache while lines pass by
#if defined(__AVX2__)
constexpr int kTogether = 8;      // lines that are gone through together
constexpr int kRowsTogether = 8;  // vectors for which a weight is decoded once
constexpr int kLinesOfDots = 4, kRowsOfDots = 4;
#else
// lanes are loops themselves, and the compiler would be at it for minutes
constexpr int kTogether = 2, kRowsTogether = 1, kLinesOfDots = 1, kRowsOfDots = 1;
#endif
constexpr std::int64_t kNear = 4096;     // bytes of all these lines together that are asked for beforehand
constexpr std::int64_t kNearOfDots = 2048;  // the same of lines that are multiplied with vectors

// Weights in blocks of thirty-two, as ChannelLines stores them.
struct Nibbles {
  static Lanes all(const void* p, std::int64_t i) {
    const auto* bytes = static_cast<const std::uint8_t*>(p) + i / 32 * 16;
    const int shift = i / 16 % 2 * 4;
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return {_mm512_permutexvar_ps(shift ? _mm512_srli_epi32(codes, 4) : codes, table)};  // looks at four bits of each
#elif defined(__AVX2__)
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i codes = _mm_and_si128(shift ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
    const __m128i signs = _mm_sub_epi8(codes, _mm_set1_epi8(8));
    return {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signs)),
             _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(signs, 8)))}};
#else
    Lanes a;
    for (int lane = 0; lane < 16; ++lane) a.r[lane] = static_cast<float>((bytes[lane] >> shift & 15) - 8);
    return a;
#endif
  }
};
template <>
constexpr int kBits<Nibbles> = 4;

template <typename Stored>
inline std::int64_t bytes_of_line(const ChannelLines& matrix) {
  return kBits<Stored> == 4 ? (matrix.width + 31) / 32 * 16 : matrix.width * kBits<Stored> / 8;
}

template <typename Stored>
inline const unsigned char* line_of(const ChannelLines& matrix, std::int64_t line) {
  return static_cast<const unsigned char*>(matrix.values) + line * bytes_of_line<Stored>(matrix);
}

inline const std::uint16_t* steps_of(const ChannelLines& matrix, std::int64_t line) {
  return static_cast<const std::uint16_t*>(matrix.scales) + line * matrix.groups();
}

// ------------------------------------------------------------------------------------------------ which channels

inline bool beyond(float input, float limit) { return !((input < 0 ? -input : input) <= limit); }  // NaN is

// Of sixteen channels those whose input is beyond its limit, as bits.
inline std::uint32_t wanted(const float* inputs, const float* limits) {
#if defined(__AVX512F__)
  const __m512 found = _mm512_abs_ps(_mm512_loadu_ps(inputs));
  return _mm512_cmp_ps_mask(found, limits ? _mm512_loadu_ps(limits) : _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  std::uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256 found = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(inputs + 8 * half));
    const __m256 limit = limits ? _mm256_loadu_ps(limits + 8 * half) : _mm256_setzero_ps();
    bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(found, limit, _CMP_NLE_UQ))) << 8 * half;
  }
  return bits;
#else
  std::uint32_t bits = 0;
  for (int lane = 0; lane < 16; ++lane)
    bits |= static_cast<std::uint32_t>(beyond(inputs[lane], limits ? limits[lane] : 0.0f)) << lane;
  return bits;
#endif
}

// Writes sixteen numbers first, first + 1, … of which the bits of `held` are kept, and their inputs; returns how many.
inline int keep(std::uint32_t held, std::int32_t first, const float* inputs, std::int32_t* places, float* live) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>(held);
  const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                       11, 12, 13, 14, 15));
  // a compressing store to memory takes some processors a hundred times as long
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(mask, numbers));
  if (live) _mm512_storeu_ps(live, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(inputs)));
  return __builtin_popcount(held);
#else
  int count = 0;
  for (; held; held &= held - 1, ++count) {
    const int lane = __builtin_ctz(held);
    places[count] = first + lane;
    if (live) live[count] = inputs[lane];
  }
  return count;
#endif
}

std::int64_t select(const float* inputs, std::int64_t stride, int rows, const float* limits, std::int64_t channels,
                    std::int32_t* places, float* live) {
  std::int64_t count = 0;
  const auto sixteen = [&](std::int64_t first, std::uint32_t within, const float* x, std::int64_t step, const float* l) {
    std::uint32_t held = 0;
    for (int b = 0; b < rows; ++b) held |= wanted(x + b * step, l);
    count += keep(held & within, static_cast<std::int32_t>(first), x, places + count, rows == 1 ? live + count : nullptr);
  };
  std::int64_t channel = 0;
  for (; channel + 16 <= channels; channel += 16)
    sixteen(channel, 0xffffu, inputs + channel, stride, limits ? limits + channel : nullptr);
  if (channel < channels) {  // nothing need be readable behind the last
    const auto left = static_cast<std::size_t>(channels - channel);
    float x[kMostTogether * 16] = {}, l[16] = {};
    for (int b = 0; b < rows; ++b) __builtin_memcpy(x + 16 * b, inputs + b * stride + channel, left * sizeof(float));
    if (limits) __builtin_memcpy(l, limits + channel, left * sizeof(float));
    sixteen(channel, (1u << left) - 1, x, 16, l);
  }
  if (rows == 1) return count;
  for (std::int64_t k = 0; k < count; ++k) {
    const float limit = limits ? limits[places[k]] : 0.0f;
    for (int b = 0; b < rows; ++b) {
      const float x = inputs[b * stride + places[k]];
      live[k * rows + b] = beyond(x, limit) ? x : 0.0f;
    }
  }
  return count;
}

// ------------------------------------------------------------------------------------------------ few live inputs

// Some lines, from one output on, and where what follows them will be read.
template <int Count>
struct Bundle {
  const unsigned char* lines[Count];
  const unsigned char* next[Count];
  const float* steps[Count];  // of int4: one for each step of outputs
  const float* inputs;        // Count × all rows
};

// Not inlined: all the cases in one function leave no registers for any of them.
template <typename Stored, int Count, int Rows>
__attribute__((noinline)) void add_bundle(const Bundle<Count>& bundle, int all_rows, std::int64_t length, float* sums,
                                          std::int64_t stride) {
  constexpr std::int64_t kBytes = kStep * kBits<Stored> / 8;
  const std::int64_t steps = (length + kStep - 1) / kStep, ahead = kNear / Count / kBytes;
  const unsigned char* lines[Count];
  const float* scales[Count];
  Lanes x[Count];
  float several[Rows][Count];
  for (int g = 0; g < Count; ++g) {
    lines[g] = bundle.lines[g];
    scales[g] = bundle.steps[g];
    if constexpr (Rows == 1) x[g] = spread(bundle.inputs[g * all_rows]);
    for (int b = 0; b < Rows; ++b) several[b][g] = bundle.inputs[g * all_rows + b];
  }
  const auto part = [&](std::int64_t begin, std::int64_t end, const unsigned char* const* near) {
    for (std::int64_t step = begin; step < end; ++step) {
#pragma GCC unroll kTogether
      for (int g = 0; g < Count; ++g) {
        if (kBytes >= 64 || step * kBytes % 64 == 0) fetch(near[g], step * kBytes);
        if (kBytes > 64) fetch(near[g], step * kBytes + 64);
      }
      for (int half = 0; half < 2; ++half) {
        Lanes weights[Count];
#pragma GCC unroll kTogether
        for (int g = 0; g < Count; ++g) {
          weights[g] = Stored::all(lines[g] + step * kBytes, 16 * half);
          if constexpr (kBits<Stored> == 4) weights[g] = multiply(weights[g], spread(scales[g][step]));
        }
        float* there = sums + step * kStep + 16 * half;
#pragma GCC unroll kTogether
        for (int b = 0; b < Rows; ++b, there += stride) {
          Lanes total = load(there);
#pragma GCC unroll kTogether
          for (int g = 0; g < Count; ++g) {
            if constexpr (Rows == 1) total = multiply_add(weights[g], x[g], total);
            else total = multiply_add(weights[g], spread(several[b][g]), total);
          }
          store(there, total);
        }
      }
    }
  };
  const unsigned char* near[Count];
  const std::int64_t middle = ahead < steps ? steps - ahead : 0;
  for (int g = 0; g < Count; ++g) near[g] = lines[g] + ahead * kBytes;
  part(0, middle, near);
  for (int g = 0; g < Count; ++g) near[g] = bundle.next[g] - middle * kBytes;
  part(middle, steps, near);
}

template <typename Stored, int Count>
inline void add_rows(const Bundle<Count>& bundle, int rows, std::int64_t length, float* sums, std::int64_t stride) {
  Bundle<Count> some = bundle;
  for (int b = 0; b < rows;) {
    const int left = rows - b;
    float* there = sums + b * stride;
    some.inputs = bundle.inputs + b;
    const int taken = left >= kRowsTogether ? kRowsTogether : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (taken == kRowsTogether) {
      add_bundle<Stored, Count, kRowsTogether>(some, rows, length, there, stride);
    } else if constexpr (kRowsTogether > 4) {
      if (taken == 4) add_bundle<Stored, Count, 4>(some, rows, length, there, stride);
      else if (taken == 2) add_bundle<Stored, Count, 2>(some, rows, length, there, stride);
      else add_bundle<Stored, Count, 1>(some, rows, length, there, stride);
    }
    b += taken;
  }
}

template <typename Stored>
struct Tile {
  static constexpr std::int64_t kMostSteps = kSums / kStep;

  const ChannelLines& matrix;
  const LiveChannels& live;
  std::int64_t first, length;  // outputs
  float* sums;
  std::int64_t stride;

  template <int Count>
  void add(std::int64_t k) const {
    const std::int64_t offset = first * kBits<Stored> / 8;
    alignas(64) float steps[kBits<Stored> == 4 ? Count : 1][kMostSteps + 16];
    Bundle<Count> bundle;
    for (int g = 0; g < Count; ++g) {
      const std::int64_t line = live.places[k + g], after = k + g + Count < live.count ? k + g + Count : live.count - 1;
      bundle.lines[g] = line_of<Stored>(matrix, line) + offset;
      bundle.next[g] = line_of<Stored>(matrix, live.places[after]) + offset;
      if constexpr (kBits<Stored> == 4) {
        decode(line, steps[g]);
        bundle.steps[g] = steps[g];
      }
    }
    bundle.inputs = live.inputs + k * live.rows;
    add_rows<Stored, Count>(bundle, live.rows, length, sums, stride);
  }

  void decode(std::int64_t line, float* steps) const {
    const std::uint16_t* all = steps_of(matrix, line);
    const std::int64_t count = (length + kStep - 1) / kStep, groups = matrix.groups(), run = matrix.group / kStep;
    const std::int64_t begin = first / kStep;
    std::int64_t done = 0;
    if (run == 1)
      for (; begin + done + 16 <= groups && done < count; done += 16) store(steps + done, Float16::all(all, begin + done));
    for (; done < count; ++done) steps[done] = half_to_float(all[(begin + done) / run]);
  }

  void all() const {
    std::int64_t k = 0;
    for (; k + kTogether <= live.count; k += kTogether) add<kTogether>(k);
    if constexpr (kTogether > 4) {
      if (k + 4 <= live.count) add<4>(k), k += 4;
      if (k + 2 <= live.count) add<2>(k), k += 2;
    }
    if (k < live.count) add<1>(k);
  }
};

template <typename Stored>
void spread_lines(const ChannelLines& matrix, const LiveChannels& live, std::int64_t first, std::int64_t last,
                  float* outputs, std::int64_t stride, bool add) {
  alignas(64) float sums[2 * kSums + kStep * kMostTogether];
  const std::int64_t most = live.rows == 1 ? kSums : 2 * kSums / live.rows / kLineBlock * kLineBlock;
  for (std::int64_t begin = first; begin < last; begin += most) {
    const std::int64_t length = begin + most < last ? most : last - begin;
    const std::int64_t wide = (length + kStep - 1) / kStep * kStep;
    __builtin_memset(sums, 0, sizeof(float) * static_cast<std::size_t>(wide * live.rows));
    Tile<Stored>{matrix, live, begin, length, sums, wide}.all();
    const float* scales = matrix.value == Value::int8 ? static_cast<const float*>(matrix.scales) + begin : nullptr;
    for (int b = 0; b < live.rows; ++b) {
      const float* from = sums + b * wide;
      float* to = outputs + b * stride + begin;
      for (std::int64_t i = 0; i < length; ++i) {
        const float found = scales ? from[i] * scales[i] : from[i];
        to[i] = add ? to[i] + found : found;
      }
    }
  }
}

void spread_any(const ChannelLines& m, const LiveChannels& live, std::int64_t first, std::int64_t last, float* outputs,
                std::int64_t stride, bool add) {
  switch (m.value) {
    case Value::float32: return spread_lines<Float32>(m, live, first, last, outputs, stride, add);
    case Value::bfloat16: return spread_lines<BFloat16>(m, live, first, last, outputs, stride, add);
    case Value::float16: return spread_lines<Float16>(m, live, first, last, outputs, stride, add);
    case Value::int8: return spread_lines<Int8>(m, live, first, last, outputs, stride, add);
    case Value::int4: return spread_lines<Nibbles>(m, live, first, last, outputs, stride, add);
  }
}

// ------------------------------------------------------------------------------------------------ few wanted outputs

inline float step_of(const ChannelLines& matrix, std::int64_t line, std::int64_t group, bool halves) {
  if (halves) return half_to_float(steps_of(matrix, line)[group]);
  return static_cast<const float*>(matrix.scales)[line * matrix.groups() + group];
}

template <typename Stored, int Lines, int Rows>
inline void dot_lines(const ChannelLines& matrix, const std::int32_t* places, const std::int32_t* following,
                      const float* inputs, std::int64_t input_stride, float* outputs, std::int64_t stride) {
  const std::int64_t run = matrix.scales ? matrix.group : matrix.width;
  const unsigned char* lines[Lines];
  const unsigned char* next[Lines];
  for (int l = 0; l < Lines; ++l) {
    lines[l] = line_of<Stored>(matrix, places[l]);
    next[l] = line_of<Stored>(matrix, following[l]);
  }
  const std::int64_t bytes = bytes_of_line<Stored>(matrix), ahead = kNearOfDots / Lines;
  Lanes totals[Lines][Rows];
  for (auto& each : totals)
    for (Lanes& one : each) one = zero();
  for (std::int64_t begin = 0, group = 0; begin < matrix.width; begin += run, ++group) {
    const std::int64_t end = begin + run < matrix.width ? begin + run : matrix.width;
    Lanes sums[Lines][Rows][2];
    for (auto& each : sums)
      for (auto& pair : each) pair[0] = pair[1] = zero();
    const auto use = [&](std::int64_t column, int half, std::uint32_t held) {
      Lanes weights[Lines];
      for (int l = 0; l < Lines; ++l) {
        weights[l] = Stored::all(lines[l], column);
        if (held != 0xffffu) weights[l] = place(weights[l], held);
      }
      for (int b = 0; b < Rows; ++b) {
        const Lanes x = load(inputs + b * input_stride + column);
        for (int l = 0; l < Lines; ++l) sums[l][b][half] = multiply_add(weights[l], x, sums[l][b][half]);
      }
    };
    std::int64_t column = begin;
    for (; column + kStep <= end; column += kStep) {
      const std::int64_t there = column * kBits<Stored> / 8 + ahead;
      for (int l = 0; l < Lines; ++l) {
        const unsigned char* near = there < bytes ? lines[l] + there : next[l] + (there - bytes);
        fetch(near, 0);
        if (kBits<Stored> > 16) fetch(near, 64);
      }
      use(column, 0, 0xffffu);
      use(column + 16, 1, 0xffffu);
    }
    if (column + 16 <= end) use(column, 0, 0xffffu), column += 16;
    if (column < end) use(column, 1, (1u << (end - column)) - 1);
    for (int l = 0; l < Lines; ++l) {
      const Lanes step = spread(matrix.scales ? step_of(matrix, places[l], group, kBits<Stored> == 4) : 1.0f);
      for (int b = 0; b < Rows; ++b) {
        const Lanes both = add(sums[l][b][0], sums[l][b][1]);
        totals[l][b] = matrix.scales ? multiply_add(both, step, totals[l][b]) : both;
      }
    }
  }
  for (int l = 0; l < Lines; ++l)
    for (int b = 0; b < Rows; ++b) outputs[b * stride + places[l]] = sum(totals[l][b]);
}

template <typename Stored, int Lines>
inline void dot_rows(const ChannelLines& matrix, const std::int32_t* places, const std::int32_t* following,
                     const float* inputs, std::int64_t input_stride, int rows, float* outputs, std::int64_t stride) {
  for (int b = 0; b < rows;) {
    const int left = rows - b;
    const float* x = inputs + b * input_stride;
    float* y = outputs + b * stride;
    const int taken = left >= kRowsOfDots ? kRowsOfDots : left >= 2 ? 2 : 1;
    if (taken == kRowsOfDots) {
      dot_lines<Stored, Lines, kRowsOfDots>(matrix, places, following, x, input_stride, y, stride);
    } else if constexpr (kRowsOfDots > 2) {
      if (taken == 2) dot_lines<Stored, Lines, 2>(matrix, places, following, x, input_stride, y, stride);
      else dot_lines<Stored, Lines, 1>(matrix, places, following, x, input_stride, y, stride);
    }
    b += taken;
  }
}

template <typename Stored>
void gather_lines(const ChannelLines& matrix, const std::int32_t* places, std::int64_t count, const float* inputs,
                  std::int64_t input_stride, int rows, float* outputs, std::int64_t stride) {
  std::int64_t k = 0;
  if constexpr (kLinesOfDots > 1)
    for (; k + kLinesOfDots <= count; k += kLinesOfDots) {
      const std::int64_t after = k + 2 * kLinesOfDots <= count ? k + kLinesOfDots : k;
      dot_rows<Stored, kLinesOfDots>(matrix, places + k, places + after, inputs, input_stride, rows, outputs, stride);
    }
  for (; k < count; ++k)
    dot_rows<Stored, 1>(matrix, places + k, places + (k + 1 < count ? k + 1 : k), inputs, input_stride, rows, outputs, stride);
}

void gather_any(const ChannelLines& m, const std::int32_t* places, std::int64_t count, const float* inputs,
                std::int64_t input_stride, int rows, float* outputs, std::int64_t stride) {
  switch (m.value) {
    case Value::float32: return gather_lines<Float32>(m, places, count, inputs, input_stride, rows, outputs, stride);
    case Value::bfloat16: return gather_lines<BFloat16>(m, places, count, inputs, input_stride, rows, outputs, stride);
    case Value::float16: return gather_lines<Float16>(m, places, count, inputs, input_stride, rows, outputs, stride);
    case Value::int8: return gather_lines<Int8>(m, places, count, inputs, input_stride, rows, outputs, stride);
    case Value::int4: return gather_lines<Nibbles>(m, places, count, inputs, input_stride, rows, outputs, stride);
  }
}

}  // namespace

const ChannelKernels& channel_table() {
  static const ChannelKernels kernels = {select, spread_any, gather_any};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
