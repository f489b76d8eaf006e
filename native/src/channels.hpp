// What the kernels of channel_kernels.cpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

enum class Value : int;

// A matrix of which one channel's weights lie side by side, as a line. In a product with few live inputs a line holds
// what one input contributes to all outputs; in one of which few outputs are wanted it holds the weights of one output.
//
// int4: thirty-two weights are sixteen bytes, weight i in the lower half of byte i, weight i + 16 in the upper half of the
// same byte, both as 8 more than they stand for. A line is filled up to whole blocks of thirty-two.
struct ChannelLines {
  std::int64_t lines;
  std::int64_t width;   // weights of a line
  const void* values;   // 128 bytes behind the last can be read
  const void* scales;   // float32 for int8, float16 for int4, else null
  std::int64_t group;   // int4 and lines of outputs: weights of a line that share a scale, int4 a multiple of 32
  Value value;

  std::int64_t groups() const { return (width + group - 1) / group; }
};

constexpr std::int64_t kLineBlock = 32;  // outputs at a multiple of which threads may divide a line
constexpr int kMostTogether = 32;        // vectors that share a list of live channels

// The channels that at least one of some vectors wants, ascending, and what each of the vectors has there: its input, or
// 0 where it does not want the channel itself.
struct LiveChannels {
  std::int64_t count;
  int rows;
  const std::int32_t* places;
  const float* inputs;  // count × rows
};

struct ChannelKernels {
  // Of `rows` vectors the channels where |input| > limits[channel], or the input is NaN; without limits, where it is not
  // 0. Fills `places` (room for `channels` + 16) and `live` (room for channels × rows + 16); returns how many there are.
  std::int64_t (*select)(const float* inputs, std::int64_t stride, int rows, const float* limits, std::int64_t channels,
                         std::int32_t* places, float* live);
  // outputs[b][i] = (or +=) Σ input · line[i] over live channels, for first ≤ i < last, both multiples of kLineBlock or
  // the end of a line. Scales of int8: one for each i.
  void (*spread)(const ChannelLines&, const LiveChannels&, std::int64_t first, std::int64_t last, float* outputs,
                 std::int64_t stride, bool add);
  // outputs[b][place] = Σ line[place][j] · inputs[b][j], for `count` places of lines. Inputs reach, with zeros, up to a
  // multiple of 64. Scales of int8: lines × groups.
  void (*gather)(const ChannelLines&, const std::int32_t* places, std::int64_t count, const float* inputs,
                 std::int64_t input_stride, int rows, float* outputs, std::int64_t stride);
};

}  // namespace gossamer
