// Products whose rows lie somewhere in a larger matrix: what the kernels of row_product_kernels.cpp work on.
//
// The left operand is packed row by row, which is where rows are gathered; the right one in panels of sixteen outputs;
// and results are put, or added, to where they belong while they are in the first cache.
#pragma once

#include <cstdint>

#include "attention_tiles.hpp"

namespace gossamer {

// Lines of a matrix, in the order of `places`, or all from the first if that is null.
struct Lines {
  Vectors vectors;
  const std::int64_t* places;

  std::int64_t at(std::int64_t line) const { return places ? places[line] : line; }
};

// Where results go: row i of a product to line places[i], or to line i.
struct Destination {
  void* data;
  std::int64_t stride;
  const std::int64_t* places;
  Value value;
  bool add;  // to what is there

  std::int64_t at(std::int64_t row) const { return places ? places[row] : row; }
};

constexpr int kMostWide = 3;  // panels that any instruction set multiplies together

// Rows first … first + count − 1 of a product.
struct RowTile {
  const float* rows;  // count × depth
  std::int64_t first;
  int count;
  std::int64_t depth;
  const float* panels;  // ⌈width / 16⌉ × depth × 16
  std::int64_t width;
  const float* bias;    // or null
  Destination to;
  float* sums;          // room for count × 16 · kMostWide
};

// y = gain ⊙ x̂ with x̂ = x · factor and factor = 1 / √(mean x² + eps), for lines of `size` numbers.
struct NormRows {
  Lines lines;
  const float* gain;
  float eps;
  void* outputs;   // of the lines' dtype, one after the other
  void* units;     // x̂, or null
  float* factors;  // of each line
};

// The gradient of x: factor · (gain ⊙ dy − x̂ · mean(gain ⊙ dy ⊙ x̂)).
struct NormGradient {
  Lines outputs;        // dy
  const void* kept;     // y, or x̂ if there is no inverse; of the same dtype, one after the other
  const float* inverse; // 1 / gain, or null
  const float* gain;
  const float* factors;
  Destination to;
};

struct RowProductKernels {
  // lines first … last − 1 as rows
  void (*rows)(const Lines&, std::int64_t first, std::int64_t last, float* target);
  // numbers first … last − 1 of all lines as rows, so that a line becomes a column
  void (*turned)(const Lines&, std::int64_t first, std::int64_t last, float* target);
  // panels first … last − 1, of sixteen lines each: panel × size × 16
  void (*across)(const Lines&, std::int64_t first, std::int64_t last, float* target);
  // panels first … last − 1, of sixteen numbers of all lines: panel × lines × 16
  void (*along)(const Lines&, std::int64_t first, std::int64_t last, float* target);
  void (*multiply)(const RowTile&);
  void (*normalise)(const NormRows&, std::int64_t first, std::int64_t last);
  void (*norm_gradient)(const NormGradient&, std::int64_t first, std::int64_t last);
};

namespace plain {
const RowProductKernels& row_product_table();
}
namespace avx2 {
const RowProductKernels& row_product_table();
}
namespace avx512 {
const RowProductKernels& row_product_table();
}
namespace avx512_bf16 {
const RowProductKernels& row_product_table();
}

}  // namespace gossamer
