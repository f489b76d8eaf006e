// What the kernels of attention_token_kernels.cpp work on: few queries with listed tokens, and the choice of tokens.
#pragma once

#include <cstdint>

#include "attention_tiles.hpp"

namespace gossamer {

constexpr std::int64_t kTokens = 64;  // whose scores are in memory at a time

// A list of tokens of one head, as numbers of four or eight bytes.
struct TokenList {
  const void* places;
  bool wide;

  std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(places)[i] : static_cast<const std::int32_t*>(places)[i];
  }
  // Whether the tokens first … last − 1 of the list are some of so many.
  bool inside(std::int64_t first, std::int64_t last, std::int64_t tokens) const {
    return wide ? inside(static_cast<const std::int64_t*>(places), first, last, tokens)
                : inside(static_cast<const std::int32_t*>(places), first, last, tokens);
  }

 private:
  template <typename Number>
  static bool inside(const Number* list, std::int64_t first, std::int64_t last, std::int64_t tokens) {
    std::int64_t least = 0, most = 0;
    for (std::int64_t i = first; i < last; ++i) {
      least = list[i] < least ? list[i] : least;
      most = list[i] > most ? list[i] : most;
    }
    return least == 0 && (most < tokens || first >= last);
  }
};

// Rows of queries that read the same tokens first … last − 1 of a list.
struct TokenTile {
  const float* rows;      // rows × size filled up with zeros to a multiple of 16, multiplied by scale / ln 2
  std::int64_t count;
  Vectors keys, values;
  TokenList tokens;
  std::int64_t first, last;
  std::int64_t end;  // of the list, whose tokens behind `last` are read next and so are asked for
  float* outputs;  // rows × strips · 16 of the values
  float* most;     // of each row: the highest score, and the sum of 2^(score − most)
  float* total;
  float* scores;   // room for rows × kTokens
};

// Labels of some bits, which stand for low + code · step of their token.
struct RoundedLabels {
  const std::uint8_t* codes;
  std::int64_t stride;  // bytes from one token to the next
  std::int64_t count;
  std::int64_t size;    // labels of a token; of 4 bits two share a byte, the first in its lower half
  int bits;             // 4 or 8
  Vectors low, step;    // of one number each
};

struct TokenKernels {
  void (*gather)(const TokenTile&);
  // scores[k] = labels[first + k] · query, for tokens first … last − 1
  void (*score)(const Vectors& labels, const float* query, std::int64_t first, std::int64_t last, float* scores);
  void (*score_rounded)(const RoundedLabels& labels, const float* query, std::int64_t first, std::int64_t last,
                        float* scores);
  // The places of the `count` highest scores, ascending; of equal ones the lower, NaN above all. 0 < count ≤ tokens.
  // `room` is for twice as many numbers as there are tokens, and 32 more.
  void (*choose)(const float* scores, std::int64_t tokens, std::int64_t count, std::int64_t* places,
                 float* room);
};

// Those of the instruction set in use.
const TokenKernels& token_kernels();

namespace plain {
const TokenKernels& token_table();
}
namespace avx2 {
const TokenKernels& token_table();
}
namespace avx512 {
const TokenKernels& token_table();
}
namespace avx512_bf16 {
const TokenKernels& token_table();
}

}  // namespace gossamer
