// Products of int8 weights with inputs that are rounded to int8: what the kernels of integer_kernels.cpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

struct BitmaskRows;
struct DenseRows;
struct Outputs;

// 64 inputs: each is its code, −127 … 127, times a scale that 32 of them share.
struct alignas(64) RoundedWord {
  std::int8_t codes[64];
  std::int32_t middles[16];  // −128 · Σ of four codes, where the kernels of an instruction set want it
  float scales[16];          // of four codes each
};

// Vectors of a batch; codes behind the last column are 0.
struct RoundedInputs {
  const RoundedWord* words;
  std::int64_t stride;  // words from one vector to the next
  int count;
};

struct IntegerKernels {
  // words × 64 inputs of one vector; an infinite or NaN input makes the scale of its 32 columns NaN
  void (*round)(const float* inputs, std::int64_t words, RoundedWord* target);
  // outputs[b][row] = Σ weight[row][column] · code[b][column] · scale[b][column], for first ≤ row < last; values are int8
  void (*dense)(const DenseRows&, std::int64_t first, std::int64_t last, const RoundedInputs&, const Outputs&);
  void (*bitmask)(const BitmaskRows&, std::int64_t first, std::int64_t last, const RoundedInputs&, const Outputs&);
};

}  // namespace gossamer
