// What the kernels of code_kernels.cpp, code_tiles.cpp and pursuit_kernels.cpp work on: rows with few features each.
#pragma once

#include <cstdint>

#include "kernels.hpp"

namespace gossamer {

// A matrix of which rows are gathered, float32 or bfloat16, row after row.
struct Dictionary {
  const void* data;
  Value value;
  std::int64_t size;  // numbers of a row
};

// Features of rows as in SparseCodes; of four bytes each.
struct Listed {
  const std::int32_t* indices;
  const float* values;
  const std::int64_t* starts;
};

constexpr int kTokens = 32;         // tokens of a packed group: two registers
constexpr int kTileRows = 32;       // features of a tile, at most
constexpr int kMarginRows = 32;     // features that share a bound of their rounding

// Scores of some features for a group of tokens. What is packed: for float32 [channel][32 tokens]; for bfloat16 two
// halves of sixteen tokens, each [pair of channels][16 tokens][2].
struct ScoreTile {
  const void* features;  // the first of `rows` rows of `size` numbers
  const void* tokens;
  std::int64_t size;     // channels; for bfloat16 a multiple of 32
  int rows;
  float* scores;         // rows × 32
};

// Candidates of a token while features stream by, in the order of the features.
struct Candidates {
  float* scores;
  std::int32_t* features;
  std::int32_t count;     // −1 once there is no room: then all features have to be looked at
};

// How far scores that were formed from rounded numbers can be from the exact ones: for token t and feature j at most
// `of_token[t]` · lengths[j / 32] + `length[t]` · errors[j / 32].
struct Margins {
  const float* lengths;  // of the longest feature of a block, and the largest rounding error
  const float* errors;
};

// A group of tokens that candidates are collected for.
struct Group {
  Candidates* candidates;  // of 32 tokens
  int tokens;              // of which so many exist
  std::int32_t room;       // of every list, a multiple of 16
  std::int64_t wanted;     // k
  const float* of_token;   // 32: see Margins
  const float* length;
  float* limits;           // 32: what the k-th best is at least worth; from 0 up
};

// One step of Adam on rows of parameters.
struct AdamRows {
  float *weights, *means, *squares;
  const float* gradients;
  std::int64_t size;  // numbers of a row
  float first, second;           // β₁ and β₂
  float rate, square_share, epsilon;  // rate / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), ε
  bool unit;          // rows are directions: gradients are straightened, and lengths stay one
};

struct CodeKernels {
  // outputs[row] = Σ value · dictionary[index], rows first … last − 1; `stride` floats from one output to the next
  void (*gather)(const Listed&, const Dictionary&, std::int64_t first, std::int64_t last, float* outputs);
  // found[i] = row · dictionary[index of i] for all i of a row
  void (*products)(const Listed&, const Dictionary&, const float* rows, std::int64_t first, std::int64_t last,
                   float* found);
  // The `wanted` highest of a row, ascending in place, of equal ones the first; float32 or bfloat16. Returns how many
  // were written, or −1 where there is a NaN. `positive`: only what is above 0. There is room for 2 · `room` spare
  // numbers and `room` places, a multiple of 16 and at least wanted + 32.
  std::int64_t (*highest)(const void* scores, Value value, std::int64_t count, std::int64_t wanted, bool positive,
                          std::int32_t* indices, float* values, float* spare, std::int32_t* spare_places,
                          std::int64_t room);
  int score_rows;  // features of a tile that `score` likes best
  void (*score)(const ScoreTile&);
  // 32 tokens, zeros where there are none; `length` of every token
  void (*pack)(const float* x, std::int64_t size, int tokens, float* packed, float* length);
  // The same in pairs of bfloat16, and how far every token was moved by rounding; `row` is room for one.
  void (*pack_bfloat16)(const float* x, std::int64_t size, std::int64_t padded, int tokens, std::uint16_t* packed,
                        std::uint16_t* row, float* length, float* error);
  // rows to bfloat16 of `padded` numbers, and of every 32 of them the longest and the largest error
  void (*round_rows)(const Dictionary&, std::int64_t first, std::int64_t last, std::int64_t padded,
                     std::uint16_t* target, float* lengths, float* errors);
  void (*lengths)(const Dictionary&, std::int64_t first, std::int64_t last, float* lengths);
  void (*collect)(const float* scores, const float* bias, std::int64_t feature, int rows, const Margins&,
                  const Group&);
  // Drops what cannot be among the best any more.
  void (*sift)(Candidates&, std::int64_t wanted, const Margins&, float of_token, float length, std::int32_t room,
               float& limit);
  // Exact scores of listed features, x · row + bias; all of them for null features.
  void (*exact)(const Dictionary&, const float* x, const float* bias, const std::int32_t* features, std::int64_t count,
                float* scores);
  // Adam on rows first … last − 1; `unit`: directions, whose gradient is straightened and whose length stays one.
  void (*adam)(const AdamRows&, std::int64_t first, std::int64_t last);
};

// Those of the instruction set in use.
const CodeKernels& code_kernels();

// By matrix registers, of code_tiles.cpp; rows is 32.
void score_tile(const ScoreTile&);

namespace plain {
const CodeKernels& code_table();
}
namespace avx2 {
const CodeKernels& code_table();
}
namespace avx512 {
const CodeKernels& code_table();
}
namespace avx512_bf16 {
const CodeKernels& code_table();
}

}  // namespace gossamer
