// Products whose rows lie somewhere in a larger matrix, and the norm that reads such rows.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.

#include "row_products.hpp"

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#include "attention_lanes.hpp"

template <int Value>
struct Count {
  static constexpr int value = Value;
};

#include "attention_vectors.hpp"

#include "attention_products.hpp"

static_assert(kWide <= kMostWide);

template <typename Stored>
Lanes numbers(const Lines& from, std::int64_t line, std::int64_t i) {
  return sixteen<Stored>(from.vectors, from.at(line), i);
}

// ------------------------------------------------------------------------------------------------ packing

template <typename Stored>
void pack_rows(const Lines& from, std::int64_t first, std::int64_t last, float* target) {
  const std::int64_t size = from.vectors.size;
  for (std::int64_t line = first; line < last; ++line, target += size)
    for (std::int64_t i = 0; i < size; i += 16) store_some(target + i, numbers<Stored>(from, line, i), size - i);
}

// Numbers i … i + 15 of sixteen lines: square[k] holds number i + k of all of them.
template <typename Stored>
void turn(const Lines& from, std::int64_t line, std::int64_t i, Lanes* square) {
  for (int c = 0; c < 16; ++c) square[c] = line + c < from.vectors.count ? numbers<Stored>(from, line + c, i) : zero();
  transpose(square);
}

template <typename Stored>
void pack_turned(const Lines& from, std::int64_t first, std::int64_t last, float* target) {
  const std::int64_t depth = from.vectors.count;
  Lanes square[16];
  for (std::int64_t i = first; i < last; i += 16)
    for (std::int64_t line = 0; line < depth; line += 16) {
      turn<Stored>(from, line, i, square);
      for (std::int64_t k = 0; k < 16 && i + k < last; ++k)
        store_some(target + (i - first + k) * depth + line, square[k], depth - line);
    }
}

template <typename Stored>
void pack_across(const Lines& from, std::int64_t first, std::int64_t last, float* target) {
  const std::int64_t size = from.vectors.size;
  Lanes square[16];
  for (std::int64_t panel = first; panel < last; ++panel, target += size * kPanel)
    for (std::int64_t i = 0; i < size; i += 16) {
      turn<Stored>(from, panel * kPanel, i, square);
      for (std::int64_t k = 0; k < 16 && i + k < size; ++k) store(target + (i + k) * kPanel, square[k]);
    }
}

template <typename Stored>
void pack_along(const Lines& from, std::int64_t first, std::int64_t last, float* target) {
  const std::int64_t count = from.vectors.count;
  for (std::int64_t line = 0; line < count; ++line)
    for (std::int64_t panel = first; panel < last; ++panel)
      store(target + ((panel - first) * count + line) * kPanel, numbers<Stored>(from, line, panel * kPanel));
}

// ------------------------------------------------------------------------------------------------ storing

Lanes taken(Value value, const void* data, std::int64_t at, std::int64_t count) {
  const Vectors from{data, 0, 1, at + count, value};
  return value == Value::float32 ? sixteen<Float32>(from, 0, at) : sixteen<BFloat16>(from, 0, at);
}

void put(Value value, void* data, std::int64_t at, Lanes numbers, std::int64_t count) {
  if (value == Value::float32) return store_some(static_cast<float*>(data) + at, numbers, count);
  float all[16];
  store(all, numbers);
  auto* to = static_cast<std::uint16_t*>(data) + at;
  for (std::int64_t i = 0; i < 16 && i < count; ++i) to[i] = round_to_bfloat16(all[i]);
}

// Numbers i … of a row of results.
void deliver(const Destination& to, std::int64_t row, std::int64_t i, Lanes numbers, std::int64_t count) {
  const std::int64_t at = to.at(row) * to.stride + i;
  put(to.value, to.data, at, to.add ? add(taken(to.value, to.data, at, count), numbers) : numbers, count);
}

// ------------------------------------------------------------------------------------------------ products

void multiply(const RowTile& tile) {
  const std::int64_t panels = (tile.width + kPanel - 1) / kPanel;
  in_widths(panels, [&](std::int64_t first, auto wide) {
    constexpr int kCount = decltype(wide)::value;
    constexpr std::int64_t kStride = kCount * kPanel;
    for (std::int64_t begin = 0; begin < tile.depth; begin += kDeep) {
      const std::int64_t length = tile.depth - begin < kDeep ? tile.depth - begin : kDeep;
      const float* from[kCount];
      for (int w = 0; w < kCount; ++w) from[w] = tile.panels + ((first + w) * tile.depth + begin) * kPanel;
      in_rows(tile.count, [&](int row, auto some) {
        // the first rows of a piece ask for the next piece, a panel each
        const int group = row / kRows;
        const bool more = group < kCount && begin + length + kDeep <= tile.depth;
        scores_of<decltype(some)::value, kCount>(tile.rows + row * tile.depth + begin, tile.depth, length, from,
                                                 more ? from[group] + length * kPanel : from[0],
                                                 tile.sums + row * kStride, kStride, begin > 0);
      });
    }
    for (int row = 0; row < tile.count; ++row)
      for (int w = 0; w < kCount; ++w) {
        const std::int64_t i = (first + w) * kPanel, left = tile.width - i;
        Lanes found = tile.depth ? load(tile.sums + row * kStride + w * kPanel) : zero();
        if (tile.bias) found = add(found, taken(Value::float32, tile.bias, i, left < 16 ? left : 16));
        deliver(tile.to, tile.first + row, i, found, left < 16 ? left : 16);
      }
  });
}

// ------------------------------------------------------------------------------------------------ norm

template <typename Stored>
Lanes rounded(Lanes a) {
  if (kBits<Stored> == 32) return a;
  alignas(64) std::uint16_t halves[16];
  put(Value::bfloat16, halves, 0, a, 16);
  return Stored::all(halves, 0);
}

template <typename Stored>
void normalise(const NormRows& norm, std::int64_t first, std::int64_t last) {
  const std::int64_t size = norm.lines.vectors.size;
  const Value value = norm.lines.vectors.value;
  for (std::int64_t line = first; line < last; ++line) {
    Lanes squares = zero();
    for (std::int64_t i = 0; i < size; i += 16) {
      const Lanes x = numbers<Stored>(norm.lines, line, i);
      squares = multiply_add(x, x, squares);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + norm.eps);
    norm.factors[line] = factor;
    for (std::int64_t i = 0; i < size; i += 16) {
      const std::int64_t left = size - i < 16 ? size - i : 16;
      const Lanes unit = rounded<Stored>(multiply(numbers<Stored>(norm.lines, line, i), spread(factor)));
      if (norm.units) put(value, norm.units, line * size + i, unit, left);
      put(value, norm.outputs, line * size + i, multiply(unit, taken(Value::float32, norm.gain, i, left)), left);
    }
  }
}

template <typename Stored>
void norm_gradient(const NormGradient& norm, std::int64_t first, std::int64_t last) {
  const std::int64_t size = norm.outputs.vectors.size;
  const Lines kept{{norm.kept, size, norm.outputs.vectors.count, size, norm.outputs.vectors.value}, nullptr};
  const auto unit = [&](std::int64_t line, std::int64_t i, std::int64_t left) {
    const Lanes found = numbers<Stored>(kept, line, i);
    return norm.inverse ? multiply(found, taken(Value::float32, norm.inverse, i, left)) : found;
  };
  const auto flow = [&](std::int64_t line, std::int64_t i, std::int64_t left) {
    return multiply(numbers<Stored>(norm.outputs, line, i), taken(Value::float32, norm.gain, i, left));
  };
  for (std::int64_t line = first; line < last; ++line) {
    Lanes products = zero();
    for (std::int64_t i = 0; i < size; i += 16) {
      const std::int64_t left = size - i < 16 ? size - i : 16;
      products = multiply_add(flow(line, i, left), unit(line, i, left), products);
    }
    const Lanes mean = spread(-sum(products) / static_cast<float>(size)), factor = spread(norm.factors[line]);
    for (std::int64_t i = 0; i < size; i += 16) {
      const std::int64_t left = size - i < 16 ? size - i : 16;
      deliver(norm.to, line, i, multiply(factor, multiply_add(unit(line, i, left), mean, flow(line, i, left))), left);
    }
  }
}

// ------------------------------------------------------------------------------------------------ table

// The kernel for the dtype of some lines.
#define GOSSAMER_BY_DTYPE(name, kernel, argument, lines)                                                     \
  void name(const argument& what, std::int64_t first, std::int64_t last) {                                   \
    if (what.lines.vectors.value == Value::float32) kernel<Float32>(what, first, last);                      \
    else kernel<BFloat16>(what, first, last);                                                                \
  }
GOSSAMER_BY_DTYPE(normalise_any, normalise, NormRows, lines)
GOSSAMER_BY_DTYPE(norm_gradient_any, norm_gradient, NormGradient, outputs)
#undef GOSSAMER_BY_DTYPE

#define GOSSAMER_PACK(name, kernel)                                                                          \
  void name(const Lines& from, std::int64_t first, std::int64_t last, float* target) {                       \
    if (from.vectors.value == Value::float32) kernel<Float32>(from, first, last, target);                    \
    else kernel<BFloat16>(from, first, last, target);                                                        \
  }
GOSSAMER_PACK(rows_any, pack_rows)
GOSSAMER_PACK(turned_any, pack_turned)
GOSSAMER_PACK(across_any, pack_across)
GOSSAMER_PACK(along_any, pack_along)
#undef GOSSAMER_PACK

constexpr RowProductKernels kTable{rows_any, turned_any, across_any,       along_any,
                                   multiply, normalise_any, norm_gradient_any};

}  // namespace

const RowProductKernels& row_product_table() { return kTable; }

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
