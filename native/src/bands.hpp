// What the kernels of blocks.hpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

enum class Value : int;
struct Inputs;
struct Outputs;

// A matrix of which blocks of `height` weights are kept that lie under each other in one column. Sixteen, eight or
// four adjacent rows form a band and keep the same columns; with a height of one this is the common form of compressed
// sparse rows. Rows that would complete the last band do not exist: what is stored for them is not used.
struct BlockRows {
  std::int64_t rows;
  std::int64_t columns;
  const std::int64_t* starts;  // bands + 1: where the blocks of a band begin
  const void* places;          // the column of each block, ascending in a band; 16 behind the last can be read
  const void* values;          // `height` for each block; 64 bytes behind the last can be read
  const float* scales;         // of each row, or null
  int height;                  // 1, 4, 8 or 16
  bool wide;                   // places are 32-bit, not 16-bit numbers
  Value value;                 // float32, bfloat16 or int8

  std::int64_t bands() const { return (rows + height - 1) / height; }
};

// Vectors of a batch side by side, so that one weight meets sixteen of them: for each column 16 · lines lanes.
struct Crossed {
  const float* data;
  int lines;  // 1, 2 or 4
  int count;  // vectors, at most 16 · lines
};

struct BlockKernels {
  // outputs[b][row] = Σ weight[row][column] · inputs[b][column], for first ≤ row < last; `first` begins a band, and
  // `last` ends one or is the last row
  void (*few)(const BlockRows&, std::int64_t first, std::int64_t last, const Inputs&, const Outputs&);
  // the same for finite inputs; at most most_lines(height) lines, which is not 0
  void (*many)(const BlockRows&, std::int64_t first, std::int64_t last, const Crossed&, const Outputs&);
  void (*expand)(const BlockRows&, std::int64_t first, std::int64_t last, float* target, std::int64_t stride);
  // columns first … last − 1 of vectors, side by side; both are multiples of 16
  void (*cross)(const Inputs&, std::int64_t first, std::int64_t last, float* target, int lines);
  bool (*finite)(const float* inputs, std::int64_t columns);
};

// Sums of a band fit into the registers for so many lines of sixteen vectors. Blocks of sixteen fill the lanes by
// themselves, and vectors side by side gain nothing: 0.
constexpr int most_lines(int height) { return height >= 16 ? 0 : height == 8 ? 2 : 4; }

}  // namespace gossamer
