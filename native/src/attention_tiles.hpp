// What the kernels of attention_kernels.cpp work on: tiles, in which some rows meet panels of sixteen columns.
//
// In the forward pass rows are queries and columns are keys; where gradients of keys and values are formed it is the
// other way round. Exponentials are powers of two: whoever packs rows multiplies them by scale / ln 2.
//
// Kernels for matrix registers read numbers of bfloat16, two to a word, in vectors that are filled up to multiples of
// 32 with zeros. Their rows come in groups of 32, and their panels in pairs that begin at even places; a panel whose
// neighbour is not read is followed by itself without bits. Rows take only the sign of scale / ln 2, since they stay
// exact; `factor` of a tile is its magnitude, which other kernels do not look at.
#pragma once

#include <cstdint>
#include <string>

namespace gossamer {

enum class Value : int;

constexpr int kPanel = 16;        // columns of a panel
constexpr int kTileRows = 64;     // most rows of a tile
constexpr int kPiece = 12;        // panels whose scores are in memory at a time
constexpr int kMatrixPiece = 32;  // the same for sums by matrix registers

// Sixteen columns, and of which of them a tile may read.
struct Panel {
  std::int32_t place;  // the columns 16 · place …
  std::uint32_t bits;
};

// Vectors of one head as they lie in a tensor.
struct Vectors {
  const void* data;
  std::int64_t stride;  // from one to the next
  std::int64_t count;
  std::int64_t size;    // numbers of a vector, which are adjacent
  Value value;          // float32 or bfloat16
};

// Which columns the rows of a tile see: row r those from low + r to high + r − 1.
struct Band {
  std::int64_t low, high;

  bool covers(std::int64_t first, std::int64_t last, int rows) const { return first >= low + rows - 1 && last < high; }
};

// Columns in the two forms that products need. `across` holds a panel's sixteen columns side by side: panel × size × 16.
// `along` holds them one after the other, in strips of sixteen numbers: panel × strips × 16 columns × 16.
struct Columns {
  const float* across;
  std::int64_t size;
  const float* along;
  std::int64_t strips;
};

struct ForwardTile {
  const float* rows;  // rows × size
  int count;
  Band band;
  const Panel* panels;  // ascending
  std::int64_t panel_count;
  Columns columns;   // keys across, values along
  float* outputs;    // rows × strips · 16
  float* most;       // of each row: the highest score, and the sum of 2^(score − most)
  float* total;
  float* scores;     // room for kTileRows × piece · 16
  float factor;
};

// Sums of 2^(score − shift) over all rows, for each column of the panels: sums[16 · k + lane] for panels[k].
struct MassTile {
  const float* rows;
  int count;
  Band band;
  const Panel* panels;
  std::int64_t panel_count;
  const float* across;
  std::int64_t size;
  const float* shifts;  // of each row
  float* sums;
  float* scores;
  float factor;
};

// Antidiagonal scoring: rows and columns are of folded vectors. The weights of all rows are in memory at once; those of
// each `height` rows are summed column by column, so that there are ⌈count / height⌉ lines of 16 · panel_count sums.
struct StripTile {
  const float* rows;
  int count;
  Band band;
  const Panel* panels;
  std::int64_t panel_count;
  const float* across;
  std::int64_t size;
  int height;
  float* sums;
  float* scores;  // room for count × 16 · panel_count
  float factor;
};

// Gradients: weights P = 2^(score − shift) and flow F = P ⊙ (G − delta), where G are the products of `grads` with the
// second columns. Whichever of rows and columns are queries have shifts and deltas.
struct GradientTile {
  const float* rows;   // rows × size
  const float* grads;  // rows × grad_size: gradients of outputs, or values
  int count;
  Band band;
  const Panel* panels;
  std::int64_t panel_count;
  Columns first;   // scores: keys (or queries) across; along, what F is multiplied with
  Columns second;  // G: values (or gradients of outputs) across; along, what P is multiplied with, may be null
  const float* shifts;  // of each row, or of each column
  const float* deltas;
  bool by_column;
  float* flow_sums;    // rows × first.strips · 16: F · first.along is added
  float* weight_sums;  // rows × second.strips · 16: P · second.along is added; may be null
  float* scores;       // room for 2 × kTileRows × kPiece · 16
};

struct AttentionKernels {
  // vectors first … last − 1 as rows, multiplied by `factor`
  void (*rows)(const Vectors&, std::int64_t first, std::int64_t last, float factor, float* target);
  // panels first … last − 1 of vectors across, zeros behind the last vector
  void (*across)(const Vectors&, std::int64_t first, std::int64_t last, float* target);
  // along; vectors whose bit in `bits`, of one word for each panel, is not set become zero
  void (*along)(const Vectors&, std::int64_t first, std::int64_t last, const std::uint16_t* bits, float* target);
  void (*forward)(const ForwardTile&);
  void (*mass)(const MassTile&);
  void (*strip)(const StripTile&);
  void (*gradient)(const GradientTile&);
  // outputs / total, to vectors of `size` numbers, and the natural logarithm of the sum of exponentials
  void (*finish)(const ForwardTile&, std::int64_t size, Value value, void* outputs, std::int64_t stride, float* lse);
  // sums of `rows` × strips · 16, times factor, to vectors of `size` numbers
  void (*write)(const float* sums, int rows, std::int64_t strips, float factor, std::int64_t size, Value value,
                void* outputs,
                std::int64_t stride);
  bool matrices;  // whether for matrix registers; those have no gradients

  int piece() const { return matrices ? kMatrixPiece : kPiece; }
};

// What packed vectors of `size` numbers take, in words of four bytes.
struct Packing {
  std::int64_t words;          // of a vector
  std::int64_t strips;         // of sixteen numbers, in which sums lie
  std::int64_t across, along;  // of a panel

  Packing(const AttentionKernels& kernels, std::int64_t size)
      : words(kernels.matrices ? (size + 31) / 32 * 16 : size),
        strips(kernels.matrices ? (size + 31) / 32 * 2 : (size + 15) / 16),
        across(words * kPanel), along(strips * (kernels.matrices ? 128 : 256)) {}
};

// Those of the instruction set in use.
const AttentionKernels& attention_kernels();

// Those for matrix registers, of attention_matrices.cpp.
const AttentionKernels& attention_matrices();

namespace plain {
const AttentionKernels& attention_table();
}
namespace avx2 {
const AttentionKernels& attention_table();
}
namespace avx512 {
const AttentionKernels& attention_table();
}
namespace avx512_bf16 {
const AttentionKernels& attention_table();
}

}  // namespace gossamer
