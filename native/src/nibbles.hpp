// Products with dense matrices of four-bit weights: NibbleRows; and dense rows as float32.
//
// Included by kernels.cpp, once for every instruction set, inside its namespace. It must not use anything from the
// standard library.
//
// Sixteen rows are computed side by side, one in each lane. Inputs are rounded to eight bits, so that the products of
// codes are exact sums of whole numbers. A weight is scale · (code − 8) + (offset + 8 · scale): the second part, which
// may be large and is the same for a whole group, meets the inputs as they are.

template <int Count, bool Offsets>
void nibble_rows(const NibbleRows& matrix, std::int64_t first, std::int64_t last, const float* inputs,
                 std::int64_t stride, float* outputs, std::int64_t output_stride) {
  const std::int64_t runs = (matrix.columns + matrix.group - 1) / matrix.group, words = runs * matrix.group / 8;
  const std::int64_t blocks = (matrix.columns + kRounded - 1) / kRounded, run = matrix.group / kRounded;
  Rounded rounded[Count];
  for (std::int64_t chunk = 0; chunk < blocks; chunk += kChunk / kRounded) {
    const std::int64_t end = chunk + kChunk / kRounded < blocks ? chunk + kChunk / kRounded : blocks;
    for (int b = 0; b < Count; ++b)
      rounded[b].fill(inputs + b * stride + chunk * kRounded, (end - chunk) * kRounded);
    for (std::int64_t panel = first / 16; panel * 16 < last; ++panel) {
      const std::uint32_t* line = matrix.words + panel * words * 16;
      Lanes sums[Count];
      for (Lanes& one : sums) one = zero();
      std::int64_t grid = (panel * runs + chunk / run) * 16, within = chunk % run;
      for (std::int64_t block = chunk; block < end; ++block) {
        const std::int64_t here = block - chunk;
        Sums dots[Count];
        for (int b = 0; b < Count; ++b) dots[b] = begin_sums(-8 * rounded[b].code_totals[here]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          fetch(line + (block * 4 + k) * 16, kAhead);
          const Bytes both = load_bytes(line + (block * 4 + k) * 16), low = low_nibbles(both), high = high_nibbles(both);
          for (int b = 0; b < Count; ++b) {
            dots[b] = dot(dots[b], low, rounded[b].four(here * kRounded + 8 * k));
            dots[b] = dot(dots[b], high, rounded[b].four(here * kRounded + 8 * k + 4));
          }
        }
        const Lanes scale = Float16::all(matrix.scales, grid);
        for (int b = 0; b < Count; ++b)
          sums[b] = multiply_add(multiply(to_float(dots[b]), scale), spread(rounded[b].scales[here]), sums[b]);
        if (Offsets) {
          const Lanes offset = multiply_add(scale, spread(8.0f), Float16::all(matrix.offsets, grid));
          for (int b = 0; b < Count; ++b) sums[b] = multiply_add(offset, spread(rounded[b].totals[here]), sums[b]);
        }
        if (++within == run) {  // a division for every block would take longer than all of its products
          within = 0;
          grid += 16;
        }
      }
      for (int b = 0; b < Count; ++b) {
        alignas(64) float found[16];
        store(found, sums[b]);
        const std::int64_t low = first > panel * 16 ? first : panel * 16;
        const std::int64_t high = last < panel * 16 + 16 ? last : panel * 16 + 16;
        float* there = outputs + b * output_stride;
        for (std::int64_t row = low; row < high; ++row)
          there[row] = chunk == 0 ? found[row - panel * 16] : there[row] + found[row - panel * 16];
      }
    }
  }
}

void expand_nibble_rows(const NibbleRows& matrix, std::int64_t first, std::int64_t last, float* target,
                        std::int64_t stride) {
  const std::int64_t runs = (matrix.columns + matrix.group - 1) / matrix.group, words = runs * matrix.group / 8;
  const std::int32_t middle = matrix.offsets ? 0 : 8;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t panel = row / 16, lane = row % 16;
    const std::uint32_t* words_of_row = matrix.words + panel * words * 16 + lane;
    float* line = target + (row - first) * stride;
    for (std::int64_t number = 0; number < runs; ++number) {
      const std::int64_t grid = (panel * runs + number) * 16 + lane;
      const float scale = half_to_float(matrix.scales[grid]);
      const float offset = matrix.offsets ? half_to_float(matrix.offsets[grid]) : 0.0f;
      const std::int64_t begin = number * matrix.group, end = begin + matrix.group;
      for (std::int64_t column = begin; column < end && column < matrix.columns; column += 8) {
        const std::uint32_t word = words_of_row[column / 8 * 16];
        float eight[8];
        for (int i = 0; i < 8; ++i) {
          const std::uint32_t code = word >> (8 * (i % 4) + 4 * (i / 4)) & 15u;
          eight[i] = static_cast<float>(static_cast<std::int32_t>(code) - middle) * scale + offset;
        }
        const std::int64_t left = matrix.columns - column;
        __builtin_memcpy(line + column, eight, sizeof(float) * static_cast<std::size_t>(left < 8 ? left : 8));
      }
    }
  }
}

template <typename Value>
void expand_dense_rows(const DenseRows& matrix, std::int64_t first, std::int64_t last, float* target,
                       std::int64_t stride) {
  const std::int64_t runs = matrix.scales ? (matrix.columns + matrix.group - 1) / matrix.group : 0;
  for (std::int64_t row = first; row < last; ++row)
    for (std::int64_t column = 0; column < matrix.columns; column += 16) {
      const Lanes scale = spread(runs ? matrix.scales[row * runs + column / matrix.group] : 1.0f);
      const std::int64_t left = matrix.columns - column;
      alignas(64) float weights[16];
      Lanes found = Value::all(matrix.values, row * matrix.columns + column);
      store(weights, multiply(found, scale));
      __builtin_memcpy(target + (row - first) * stride + column, weights,
                       sizeof(float) * static_cast<std::size_t>(left < 16 ? left : 16));
    }
}
