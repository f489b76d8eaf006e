// What the kernels of masking.hpp and training.hpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int kTileVectors = 4;                // of sixteen positions
constexpr int kTile = 16 * kTileVectors;       // positions that are worked on at a time

// Adjacent columns of a matrix of which only the non-zeros exist.
struct SparseRows {
  const std::int32_t* starts;   // rows + 1: where the non-zeros of a row begin
  const std::uint16_t* places;  // column, counted from the first of these
  const float* values;          // null where only places matter
};

// Features of some positions, or where they go to: element (position, feature) lies at
// data[position · position_stride + feature · feature_stride], and one of the strides is 1.
struct Features {
  const float* data;
  std::int64_t position_stride;
  std::int64_t feature_stride;
  bool streamed = false;  // outputs that are so many that no cache will hold them until they are read
};

struct TrainingKernels {
  // values where the bit is 0 become +0; elements 64 · first … 64 · last − 1 of `count`, of 2, 4 or 8 bytes each.
  // False if there is no kernel for so many bytes.
  bool (*mask)(void* values, int bytes, const std::uint8_t* bits, std::int64_t first, std::int64_t last,
               std::int64_t count);
  // tile[feature][position] of features first … last − 1 and `count` positions, zeros up to a multiple of sixteen
  void (*pack)(const Features&, int count, std::int64_t first, std::int64_t last, float* tile);
  // target[position][row] = bias[row] + Σ value · tile[place][position]. `sums`, rows × tile, carries them from one
  // range of columns to the next: null before the first, and null behind the last.
  void (*multiply)(const SparseRows&, std::int64_t first, std::int64_t last, const float* tile, int count,
                   const float* bias, const float* before, float* behind, const Features& target);
  // gradient[nz] (+)= Σ outputs[position][row] · tile[place][position]
  void (*outer)(const SparseRows&, std::int64_t first, std::int64_t last, const float* tile, int count,
                const Features& outputs, float* gradient, bool add);
};

}  // namespace gossamer
