// Memory for inputs that are rounded to int8, filled once for each product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace gossamer {

class RoundedVectors {
 public:
  RoundedInputs fill(const Kernels& kernels, const Inputs& inputs, std::int64_t columns) {
    const std::int64_t words = (columns + 63) / 64;
    const auto needed = static_cast<std::size_t>(words) * static_cast<std::size_t>(inputs.count);
    if (words_.size() < needed) words_.resize(needed);
    for (int b = 0; b < inputs.count; ++b)
      kernels.integers.round(inputs.data + b * inputs.stride, words, words_.data() + b * words);
    return {words_.data(), words, inputs.count};
  }

 private:
  std::vector<RoundedWord> words_;
};

}  // namespace gossamer
