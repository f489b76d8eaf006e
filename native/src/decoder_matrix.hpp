// A weight of a decoder, in any of the storages that there are kernels for, and its products with a few vectors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace gossamer {

// What kernels may read of so many inputs: zeros follow them.
constexpr std::int64_t padded(std::int64_t count) { return (count + 63) / 64 * 64; }

// Where part `part` of `count` things begins.
constexpr std::int64_t begin_of(std::int64_t count, int part, int parts) { return count * part / parts; }

// first … last − 1
struct Range {
  std::int64_t first, last;
};

// Memory that a thread keeps from one product to the next; kernels may write a little behind what they were asked for.
template <typename T>
class Room {
 public:
  T* of(std::int64_t count) {
    if (memory_.size() < static_cast<std::size_t>(count) + 16) memory_.resize(static_cast<std::size_t>(count) + 16);
    return memory_.data();
  }

 private:
  std::vector<T> memory_;
};

struct Matrix {
  enum class Kind : int {
    none = 0,
    dense = 1,
    bitmask = 2,
    groups = 3,
    nibbles = 4,
    blocks = 5,
    patterns = 6,
    channels = 7,     // a line for each input
    nibble_rows = 8,  // a line for each output
  };

  Kind kind = Kind::none;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const float* bias = nullptr;
  DenseRows dense{};
  BitmaskRows bitmask{};
  GroupRows groups{};
  NibbleRows nibbles{};
  BlockRows blocks{};
  PatternRows patterns{};
  ChannelLines lines{};
  const float* limits = nullptr;  // channels: inputs of at most this size count as zero
  bool rounded = false;           // dense and bitmask in int8: inputs are rounded to int8 as well

  // Whether products round the inputs.
  bool rounds() const { return rounded || kind == Kind::nibbles || kind == Kind::groups; }

  // Divide the rows among so many threads, so that all of them read about as much.
  void divide(int parts);
  // The rows of a thread, once they have been divided.
  Range part(int number) const {
    const auto index = static_cast<std::size_t>(number);
    return {cuts_[index], cuts_[index + 1]};
  }
  // Rows whose weights stay in the cache while several vectors use them.
  std::int64_t piece() const;

  // outputs[b][row] = Σ weight[row][column] · inputs[b][column] + bias[row]; `sparse`: with limits, if there are any.
  void multiply(const Kernels& kernels, Range wanted, const Inputs& inputs, const Outputs& outputs, bool sparse) const;
  // Of `channels`: what one half of the live inputs adds to these rows, and the bias with the first half.
  void multiply_half(const Kernels& kernels, int half, Range wanted, const Inputs& inputs, const Outputs& outputs,
                     bool sparse) const;
  // The rows `places` alone; for `dense`, which then round nothing, and `nibble_rows`.
  void multiply_some(const Kernels& kernels, const std::int32_t* places, std::int64_t count, const Inputs& inputs,
                     const Outputs& outputs) const;
  // The same as `multiply` with dense rows and without rounding.
  void multiply_exactly(const Kernels& kernels, Range wanted, const Inputs& inputs, const Outputs& outputs) const;
  // One row, dense. Nothing for `channels` and `nibble_rows`, which neither store embeddings nor round.
  void expand_row(const Kernels& kernels, std::int64_t row, float* target) const;

 private:
  const std::int64_t* starts() const;
  std::int64_t unit() const;
  void add_bias(const Kernels& kernels, Range wanted, int count, const Outputs& outputs) const;

  std::vector<std::int64_t> cuts_;  // the first row of each part, and where the last one ends
};

}  // namespace gossamer
