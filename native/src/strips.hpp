// What the kernels of convolution.hpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

// Weights of a convolution. Blocks of adjacent output channels share the list of input channels that they keep; of a
// kept one all taps are stored.
struct ConvolutionBlocks {
  std::int64_t outputs;
  std::int64_t inputs;
  int block;                   // output channels of a block: 1, 2, 4, 8 or 16; the last block may reach beyond `outputs`
  int taps;                    // weights of a kernel
  const std::int64_t* starts;  // blocks + 1: where the kept channels of a block begin
  const std::int32_t* places;  // input channel, ascending within a block
  const float* values;         // taps × block for each kept channel
  const std::uint16_t* halves; // the same in float16, or null; then `values` are null
  std::int64_t skipped;        // kept channels before the first of which `values` are given
  const float* bias;           // for every channel of every block, or null
  float low, high;             // results are clamped
};

// The same in whole numbers: four kept channels at a time, of which a lane sums the products.
struct ByteBlocks {
  std::int64_t outputs;
  std::int64_t inputs;
  int block;
  int taps;
  const std::int64_t* starts;  // blocks + 1: where the fours of a block begin
  const std::int32_t* places;  // four input channels for each; what fills up the last four of a block has weight 0
  const std::int8_t* values;   // taps × block × 4 for each four
  const float* scales;         // what 1 stands for, for every channel of every block
  const std::int32_t* totals;  // sum of its whole weights, for every channel of every block
  const float* bias;           // for every channel of every block, or null
  float low, high;
};

// Adjacent positions of a strip that are adjacent in the output as well.
struct Run {
  std::int64_t from;    // in the strip
  std::int64_t to;      // in the output
  std::int64_t length;
};

// Positions that are worked on at a time, and where they lie.
struct Strip {
  const float* inputs;
  std::int64_t stride;       // from one input channel to the next
  const std::int64_t* taps;  // where the input of each tap lies, relative to the first
  const Run* runs;
  int run_count;
  int vectors;               // of sixteen positions; all of them can be read
  bool whole;                // an input is infinite or NaN, so that zeros have to be multiplied as well
  float* weights;            // room for those of a block, if they are float16
  float* outputs;
  std::int64_t output_stride;  // from one output channel to the next
};

// Sixty-four positions of bytes: a byte b stands for `scale` · (b − `zero`).
struct ByteStrip {
  const std::uint8_t* inputs;
  std::int64_t stride;  // from one input channel to the next
  const std::int64_t* taps;
  float scale;
  std::int32_t zero;
  Strip to;  // where the results go; nothing else of it is used
};

// One channel of a depthwise convolution.
struct Plane {
  const float* inputs;
  const std::int64_t* taps;  // where the input of each tap lies, relative to the position
  const float* weights;
  int count;                 // of taps
  float bias, low, high;
};

constexpr int kMostVectors = 8;
constexpr int kBytePositions = 64;  // of a strip of bytes

}  // namespace gossamer
