// The kernels, as one table of functions for each instruction set.
//
// A kernel works on a range of rows; what is divided among threads, and how, is decided by its caller. No row is ever
// divided, so that a result does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bands.hpp"
#include "channels.hpp"
#include "integer_rows.hpp"
#include "magnitudes.hpp"
#include "patterns.hpp"
#include "sparse_rows.hpp"
#include "steps.hpp"
#include "strips.hpp"

namespace gossamer {

// What a stored weight is.
enum class Value : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3, int4 = 4 };

// Vectors of the input, one for each row of the batch, in float32. Behind the last column each holds zeros up to a
// multiple of 64 columns.
struct Inputs {
  const float* data;
  std::int64_t stride;  // from one vector to the next
  int count;
};

struct Outputs {
  float* data;
  std::int64_t stride;
};

// A matrix of which only the non-zero weights are stored: a bit for each weight, and the values of those that are kept.
struct BitmaskRows {
  std::int64_t columns;
  const std::uint64_t* bits;    // rows × ceil(columns / 64); bit i of a word is its i-th column
  const void* values;           // row after row; 64 bytes behind the last can be read
  const std::int64_t* starts;   // rows + 1: where the values of a row begin (int4: an even number of them)
  const float* scales;          // rows × ceil(columns / group), or null
  std::int64_t group;           // columns that share a scale, a multiple of 64
  Value value;
};

// A matrix with every weight stored.
struct DenseRows {
  std::int64_t columns;
  const void* values;   // rows × columns; int4: rows × columns / 2 bytes, see below
  const float* scales;  // rows × ceil(columns / group), or null
  std::int64_t group;   // columns that share a scale, a multiple of 16
  Value value;
};

// A matrix of which whole groups of 16 adjacent weights of a row are kept, each in four bits with a scale and a zero.
//
// Sixteen weights are the eight bytes of a little-endian 64-bit word. Weight i is nibble i / 2 of its lower half for
// even i, of its upper half for odd i: after a broadcast to sixteen 32-bit lanes, lane i needs one shift by 4 (i / 2).
// The zeros of sixteen groups are packed in the same way. If the columns do not divide into groups, the last group of a
// row reaches into the zeros behind the inputs.
struct GroupRows {
  std::int64_t columns;
  const std::int64_t* starts;      // rows + 1: where the groups of a row begin
  const std::uint16_t* places;     // which group of the row; up to a multiple of 16 groups
  const std::uint64_t* words;      // 16 weights
  const std::uint16_t* scales;     // float16; up to a multiple of 16 groups
  const std::uint64_t* zeros;      // of 16 groups
};

struct Kernels {
  // outputs[b][row] = Σ weight[row][column] · inputs[b][column], for first ≤ row < last
  void (*bitmask)(const BitmaskRows&, std::int64_t first, std::int64_t last, const Inputs&, const Outputs&);
  void (*dense)(const DenseRows&, std::int64_t first, std::int64_t last, const Inputs&, const Outputs&);
  void (*groups)(const GroupRows&, std::int64_t first, std::int64_t last, const Inputs&, const Outputs&);
  // dense float32 rows, for products with many vectors: target[row − first][column], `stride` floats apart
  void (*expand_bitmask)(const BitmaskRows&, std::int64_t first, std::int64_t last, float* target, std::int64_t stride);
  void (*expand_groups)(const GroupRows&, std::int64_t first, std::int64_t last, float* target, std::int64_t stride);
  void (*convolution)(const ConvolutionBlocks&, std::int64_t first, std::int64_t last, const Strip&);  // blocks
  bool (*gather)(const float* source, std::int64_t stride, float* target, std::int64_t width, std::int64_t length,
                 std::int64_t channels);  // false if an input is infinite or NaN
  void (*convolution_bytes)(const ByteBlocks&, std::int64_t first, std::int64_t last, const ByteStrip&);  // blocks
  bool (*find_range)(const float* source, std::int64_t count, float& low, float& high);
  bool (*round_to_bytes)(const float* source, std::int64_t count, float inverse, float zero, std::uint8_t* target);
  bool (*copy_runs)(const Run* runs, std::int64_t count, std::int64_t step, const float* source,
                    float* target);  // false if a value is infinite or NaN
  // of one channel; inputs and outputs reach up to a multiple of 64 positions
  void (*depthwise)(const Plane&, std::int64_t positions, float* outputs);
  void (*widen_bfloat16)(const std::uint16_t* source, float* target, std::int64_t count);
  void (*narrow_bfloat16)(const float* source, std::uint16_t* target, std::int64_t count);  // to nearest, ties to even
  StepKernels steps;
  // keep[row][i] = whether score i of a row of m is among its m − dropped highest; false if m has no kernel
  bool (*keep_highest)(const float* scores, std::int64_t rows, int m, int dropped, std::uint8_t* keep);
  TrainingKernels training;
  BlockKernels blocks;
  PatternKernels patterns;
  ChannelKernels channels;
  IntegerKernels integers;
  // adds to kBinLanes sets of kBins counters; returns where
  BinRange (*count_magnitudes)(const MagnitudeRows&, std::int64_t first, std::int64_t last, std::uint32_t* counts);  // rows
};

namespace plain {
const Kernels& table();
const BlockKernels& block_table();      // of block_kernels.cpp
const PatternKernels& pattern_table();  // of pattern_kernels.cpp
const ChannelKernels& channel_table();  // of channel_kernels.cpp
const IntegerKernels& integer_table();  // of integer_kernels.cpp
}
namespace avx2 {
const Kernels& table();
const BlockKernels& block_table();      // of block_kernels.cpp
const PatternKernels& pattern_table();  // of pattern_kernels.cpp
const ChannelKernels& channel_table();  // of channel_kernels.cpp
const IntegerKernels& integer_table();  // of integer_kernels.cpp
}
namespace avx512 {
const Kernels& table();
const BlockKernels& block_table();      // of block_kernels.cpp
const PatternKernels& pattern_table();  // of pattern_kernels.cpp
const ChannelKernels& channel_table();  // of channel_kernels.cpp
const IntegerKernels& integer_table();  // of integer_kernels.cpp
}
namespace avx512_bf16 {
const Kernels& table();
const BlockKernels& block_table();      // of block_kernels.cpp
const PatternKernels& pattern_table();  // of pattern_kernels.cpp
const ChannelKernels& channel_table();  // of channel_kernels.cpp
const IntegerKernels& integer_table();  // of integer_kernels.cpp
}

}  // namespace gossamer
