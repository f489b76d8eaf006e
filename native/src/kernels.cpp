// Compiled once for every instruction set, into the namespace GOSSAMER_ISA.

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

constexpr int kBatch = 4;  // vectors of the batch for which a weight is decoded once

// ------------------------------------------------------------------------------------------------ bitmask
//
// A word of 64 columns is four steps of sixteen. The first value of each step is known from the word alone, so that
// only one addition per word, and not one per step, waits for the one before it.

template <typename Value, typename Use>
inline void each_step(const BitmaskRows& matrix, std::int64_t row, std::int64_t first, std::int64_t last,
                      std::int64_t& next, Use&& use) {
  const std::int64_t words = (matrix.columns + 63) / 64;
  const std::uint64_t* bits = matrix.bits + row * words;
  for (std::int64_t word = first; word < last; ++word) {
    const std::uint64_t mask = bits[word];
    fetch(matrix.values, next * kBits<Value> / 8 + kAhead);
    if (kBits<Value> > 8) fetch(matrix.values, next * kBits<Value> / 8 + kAhead + 64);
    std::int64_t begins[4] = {next, next + __builtin_popcountll(mask & 0xffffull),
                              next + __builtin_popcountll(mask & 0xffffffffull),
                              next + __builtin_popcountll(mask & 0xffffffffffffull)};
    next += __builtin_popcountll(mask);
    for (int step = 0; step < 4; ++step) {
      const auto held = static_cast<std::uint32_t>(mask >> (16 * step) & 0xffff);
      use(word * 64 + step * 16, step, place(Value::all(matrix.values, begins[step]), held));
    }
  }
}

template <typename Value, int Count>
void bitmask_rows(const BitmaskRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                  std::int64_t stride, float* outputs, std::int64_t output_stride) {
  const std::int64_t words = (matrix.columns + 63) / 64;
  const std::int64_t run = matrix.scales ? matrix.group / 64 : words;
  const std::int64_t runs = matrix.scales ? (words + run - 1) / run : 1;
  for (std::int64_t row = first; row < last; ++row) {
    std::int64_t next = matrix.starts[row];
    Lanes totals[Count];
    for (Lanes& total : totals) total = zero();
    for (std::int64_t number = 0; number < runs; ++number) {
      const std::int64_t begin = number * run, end = begin + run < words ? begin + run : words;
      Lanes sums[Count][2];
      for (auto& pair : sums) pair[0] = pair[1] = zero();
      each_step<Value>(matrix, row, begin, end, next, [&](std::int64_t column, int step, Lanes weights) {
        for (int b = 0; b < Count; ++b)
          sums[b][step & 1] = multiply_add(weights, load(inputs + b * stride + column), sums[b][step & 1]);
      });
      for (int b = 0; b < Count; ++b) {
        const Lanes both = add(sums[b][0], sums[b][1]);
        totals[b] = matrix.scales ? multiply_add(both, spread(matrix.scales[row * runs + number]), totals[b]) : both;
      }
    }
    for (int b = 0; b < Count; ++b) outputs[b * output_stride + row] = sum(totals[b]);
  }
}

template <typename Value>
void expand_bitmask_rows(const BitmaskRows& matrix, std::int64_t first, std::int64_t last, float* target,
                         std::int64_t stride) {
  const std::int64_t words = (matrix.columns + 63) / 64;
  const std::int64_t run = matrix.scales ? matrix.group / 64 : words;
  const std::int64_t runs = matrix.scales ? (words + run - 1) / run : 1;
  for (std::int64_t row = first; row < last; ++row) {
    std::int64_t next = matrix.starts[row];
    for (std::int64_t number = 0; number < runs; ++number) {
      const std::int64_t begin = number * run, end = begin + run < words ? begin + run : words;
      const Lanes scale = spread(matrix.scales ? matrix.scales[row * runs + number] : 1.0f);
      each_step<Value>(matrix, row, begin, end, next, [&](std::int64_t column, int, Lanes weights) {
        float* there = target + (row - first) * stride + column;
        if (column + 16 <= matrix.columns) {
          store(there, multiply(weights, scale));
        } else if (column < matrix.columns) {
          float last_ones[16];
          store(last_ones, multiply(weights, scale));
          __builtin_memcpy(there, last_ones, sizeof(float) * static_cast<std::size_t>(matrix.columns - column));
        }
      });
    }
  }
}

// ------------------------------------------------------------------------------------------------ dense

constexpr std::int64_t kFar = 4096;  // bytes; a row is one stream, and a thread reads no other beside it

template <typename Value, int Count>
void dense_rows(const DenseRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                std::int64_t stride, float* outputs, std::int64_t output_stride) {
  const std::int64_t run = matrix.scales ? matrix.group : matrix.columns;
  const std::int64_t runs = (matrix.columns + run - 1) / run;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t base = row * matrix.columns;
    Lanes totals[Count];
    for (Lanes& total : totals) total = zero();
    for (std::int64_t number = 0; number < runs; ++number) {
      const std::int64_t begin = number * run, end = begin + run < matrix.columns ? begin + run : matrix.columns;
      Lanes sums[Count][2];
      for (auto& pair : sums) pair[0] = pair[1] = zero();
      std::int64_t column = begin;
      for (; column + 32 <= end; column += 32) {
        fetch(matrix.values, (base + column) * kBits<Value> / 8 + kFar);
        if (kBits<Value> > 16) fetch(matrix.values, (base + column) * kBits<Value> / 8 + kFar + 64);
        for (int half = 0; half < 2; ++half) {
          const Lanes weights = Value::all(matrix.values, base + column + 16 * half);
          for (int b = 0; b < Count; ++b)
            sums[b][half] = multiply_add(weights, load(inputs + b * stride + column + 16 * half), sums[b][half]);
        }
      }
      if (column + 16 <= end) {
        const Lanes weights = Value::all(matrix.values, base + column);
        for (int b = 0; b < Count; ++b)
          sums[b][0] = multiply_add(weights, load(inputs + b * stride + column), sums[b][0]);
        column += 16;
      }
      if (column < end) {  // only in the last run: what follows in memory belongs to the next row
        const auto left = static_cast<int>(end - column);
        const Lanes weights = place(Value::all(matrix.values, base + column), (1u << left) - 1);
        for (int b = 0; b < Count; ++b)
          sums[b][1] = multiply_add(weights, load(inputs + b * stride + column), sums[b][1]);
      }
      for (int b = 0; b < Count; ++b) {
        const Lanes both = add(sums[b][0], sums[b][1]);
        totals[b] = matrix.scales ? multiply_add(both, spread(matrix.scales[row * runs + number]), totals[b]) : both;
      }
    }
    for (int b = 0; b < Count; ++b) outputs[b * output_stride + row] = sum(totals[b]);
  }
}

#if defined(__AVX512F__)
#include "dense_tiles.hpp"
#endif
#include "dots.hpp"
#include "groups.hpp"
#include "convolution.hpp"
#include "convolution_bytes.hpp"
#include "nibbles.hpp"
#include "attention.hpp"
#include "masking.hpp"
#include "training.hpp"

// ------------------------------------------------------------------------------------------------ choosing

// A matrix against vectors of a batch, a few at a time; `rows` is a kernel for a known number of them.
template <template <int> class Rows, typename Matrix>
void in_batches(const Matrix& matrix, std::int64_t first, std::int64_t last, const Inputs& inputs,
                const Outputs& outputs) {
  for (int b = 0; b < inputs.count;) {
    const float* from = inputs.data + b * inputs.stride;
    float* to = outputs.data + b * outputs.stride;
    const int left = inputs.count - b;
    const int taken = left >= kBatch ? kBatch : left >= 2 ? 2 : 1;
    if (taken == kBatch) {
      Rows<kBatch>::run(matrix, first, last, from, inputs.stride, to, outputs.stride);
    } else if (taken == 2) {
      Rows<2>::run(matrix, first, last, from, inputs.stride, to, outputs.stride);
    } else {
      Rows<1>::run(matrix, first, last, from, inputs.stride, to, outputs.stride);
    }
    b += taken;
  }
}

template <int Count>
struct BitmaskOf {
  static void run(const BitmaskRows& m, std::int64_t first, std::int64_t last, const float* x, std::int64_t xs,
                  float* y, std::int64_t ys) {
    switch (m.value) {
      case Value::float32: return bitmask_rows<Float32, Count>(m, first, last, x, xs, y, ys);
      case Value::bfloat16: return bitmask_rows<BFloat16, Count>(m, first, last, x, xs, y, ys);
      case Value::float16: return bitmask_rows<Float16, Count>(m, first, last, x, xs, y, ys);
      case Value::int8: return bitmask_rows<Int8, Count>(m, first, last, x, xs, y, ys);
      case Value::int4: return bitmask_rows<Int4, Count>(m, first, last, x, xs, y, ys);
    }
  }
};

template <int Count>
struct DenseOf {
  static void run(const DenseRows& m, std::int64_t first, std::int64_t last, const float* x, std::int64_t xs, float* y,
                  std::int64_t ys) {
    switch (m.value) {
      case Value::float32: return dense_rows<Float32, Count>(m, first, last, x, xs, y, ys);
      case Value::bfloat16: return dense_rows<BFloat16, Count>(m, first, last, x, xs, y, ys);
      case Value::float16: return dense_rows<Float16, Count>(m, first, last, x, xs, y, ys);
      case Value::int8: return dense_rows<Int8, Count>(m, first, last, x, xs, y, ys);
      case Value::int4: return dense_rows<Int4, Count>(m, first, last, x, xs, y, ys);
    }
  }
};

#if defined(__AVX512F__)
// Returns the first row that is left over.
std::int64_t tiles_of_any(const DenseRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs, const Outputs& outputs) {
  if (m.scales || !m.columns) return first;
  switch (m.value) {
    case Value::float32: return dense_tiles<Float32>(m, first, last, inputs, outputs);
    case Value::bfloat16: return dense_tiles<BFloat16>(m, first, last, inputs, outputs);
    case Value::float16: return dense_tiles<Float16>(m, first, last, inputs, outputs);
    default: return first;
  }
}
#endif

void dense_product(const DenseRows& m, std::int64_t first, std::int64_t last, const Inputs& inputs, const Outputs& outputs) {
  int done = 0;
#if defined(__AVX512F__)
  while (inputs.count - done >= kBatch) {
    const int left = inputs.count - done, taken = left < kTileMost ? left : kTileMost;
    const Inputs some{inputs.data + done * inputs.stride, inputs.stride, taken};
    const Outputs there{outputs.data + done * outputs.stride, outputs.stride};
    in_batches<DenseOf, DenseRows>(m, tiles_of_any(m, first, last, some, there), last, some, there);
    done += taken;
  }
#endif
  in_batches<DenseOf, DenseRows>(m, first, last, {inputs.data + done * inputs.stride, inputs.stride, inputs.count - done},
                                 {outputs.data + done * outputs.stride, outputs.stride});
}

template <int Count>
struct GroupsOf {
  static void run(const GroupRows& m, std::int64_t first, std::int64_t last, const float* x, std::int64_t xs, float* y,
                  std::int64_t ys) {
#if defined(__AVX512VNNI__)
    bool finite = true;
    for (int b = 0; b < Count; ++b) finite = finite && all_finite(x + b * xs, m.columns);
    if (finite && m.columns <= kMostRounded) return group_rows_of_codes<Count>(m, first, last, x, xs, y, ys);
#endif
    group_rows<Count>(m, first, last, x, xs, y, ys);
  }
};

#include "selection.hpp"

void expand_bitmask(const BitmaskRows& m, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
  switch (m.value) {
    case Value::float32: return expand_bitmask_rows<Float32>(m, first, last, target, stride);
    case Value::bfloat16: return expand_bitmask_rows<BFloat16>(m, first, last, target, stride);
    case Value::float16: return expand_bitmask_rows<Float16>(m, first, last, target, stride);
    case Value::int8: return expand_bitmask_rows<Int8>(m, first, last, target, stride);
    case Value::int4: return expand_bitmask_rows<Int4>(m, first, last, target, stride);
  }
}

template <int Count>
struct NibblesOf {
  static void run(const NibbleRows& m, std::int64_t first, std::int64_t last, const float* x, std::int64_t xs, float* y,
                  std::int64_t ys) {
    if (m.offsets) return nibble_rows<Count, true>(m, first, last, x, xs, y, ys);
    nibble_rows<Count, false>(m, first, last, x, xs, y, ys);
  }
};

void expand_dense(const DenseRows& m, std::int64_t first, std::int64_t last, float* target, std::int64_t stride) {
  switch (m.value) {
    case Value::float32: return expand_dense_rows<Float32>(m, first, last, target, stride);
    case Value::bfloat16: return expand_dense_rows<BFloat16>(m, first, last, target, stride);
    case Value::float16: return expand_dense_rows<Float16>(m, first, last, target, stride);
    case Value::int8: return expand_dense_rows<Int8>(m, first, last, target, stride);
    case Value::int4: return expand_dense_rows<Int4>(m, first, last, target, stride);
  }
}

void widen_bfloat16(const std::uint16_t* source, float* target, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(target + i, BFloat16::all(source, i));
  for (; i < count; ++i) target[i] = as_float(static_cast<std::uint32_t>(source[i]) << 16);
}

void narrow_bfloat16(const float* source, std::uint16_t* target, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, source + i, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    target[i] = static_cast<std::uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

#include "histogram.hpp"

}  // namespace

const Kernels& table() {
  static const Kernels kernels = {in_batches<BitmaskOf, BitmaskRows>, dense_product,
                                  in_batches<GroupsOf, GroupRows>,    expand_bitmask,
                                  expand_group_rows,                  convolution,
                                  gather,                             convolution_bytes,
                                  find_range,                         round_to_bytes,
                                  copy_runs,                          depthwise,
                                  widen_bfloat16,                     narrow_bfloat16,
                                  {in_batches<NibblesOf, NibbleRows>, expand_nibble_rows, expand_dense, normalise,
                                   add_to, rotate, activate, cap_values, largest, attend, merge},
                                  keep_highest,
                                  {mask_values, pack_tile, multiply_tile, outer_tile},
                                  block_table(),
                                  pattern_table(),
                                  channel_table(),
                                  integer_table(),
                                  count_magnitudes};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
