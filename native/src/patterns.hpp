// What the kernels of pattern_kernels.cpp work on.
#pragma once

#include <cstdint>

namespace gossamer {

enum class Value : int;
struct Inputs;
struct Outputs;

constexpr int kPatternPanel = 16;  // rows that lie side by side

// Bits of a place among m columns, and places that a word holds.
constexpr int place_bits(int m) { return m <= 2 ? 1 : 1 + place_bits(m / 2); }
constexpr int places_of_word(int m) { return 32 / place_bits(m); }

// A matrix that keeps n of every m adjacent weights of a row. Columns are filled up to a multiple of m with zeros, rows
// to a multiple of sixteen, which form a panel: whatever is stored, is stored for sixteen rows side by side.
//
// A panel holds, one after the other for every run of columns that share a scale, n passes through the run: the first
// kept weight of all its groups of m, then the second, and so on. A word of a row holds the places of as many adjacent
// groups of a pass as fit into it, the first in its lowest bits; every pass begins with words of its own.
struct PatternRows {
  std::int64_t rows;
  std::int64_t columns;
  int n;
  int m;                        // 2, 4, 8, 16 or 32
  const void* values;
  const std::uint32_t* places;  // column within its group
  const float* scales;          // panels × runs × 16, or null
  std::int64_t group;           // columns of a run, a multiple of 64; not used without scales
  Value value;                  // float32, bfloat16 or int8

  std::int64_t panels() const { return (rows + kPatternPanel - 1) / kPatternPanel; }
  std::int64_t groups() const { return (columns + m - 1) / m; }
  std::int64_t groups_of_run() const { return scales ? group / m : groups(); }
  std::int64_t runs() const { return columns ? (groups() + groups_of_run() - 1) / groups_of_run() : 0; }
  std::int64_t words_of_pass(std::int64_t count) const { return (count + places_of_word(m) - 1) / places_of_word(m); }
  std::int64_t words_of_panel() const {
    if (!columns) return 0;
    const std::int64_t last = groups() - (runs() - 1) * groups_of_run();
    return n * ((runs() - 1) * words_of_pass(groups_of_run()) + words_of_pass(last));
  }
};

struct PatternKernels {
  // outputs[b][row] = Σ weight[row][column] · inputs[b][column], for first ≤ row < last
  void (*multiply)(const PatternRows&, std::int64_t first, std::int64_t last, const Inputs&, const Outputs&);
  void (*expand)(const PatternRows&, std::int64_t first, std::int64_t last, float* target, std::int64_t stride);
};

}  // namespace gossamer
