#include "decoder_matrix.hpp"

#include "integer_inputs.hpp"

namespace gossamer {
namespace {

constexpr std::int64_t kNibblePanel = 16;       // rows that lie side by side
constexpr std::int64_t kRowsOfKernel = 16;      // rows that most kernels compute side by side
constexpr std::int64_t kDenseRowsOfKernel = 12;  // the same of dense rows, or half as many
constexpr std::int64_t kLinesTogether = 8;      // lines that the kernel of channels takes at a time
constexpr std::int64_t kWeightsOfPiece = 32768;

thread_local Room<std::int32_t> places_room;
thread_local Room<float> values_room;
thread_local RoundedVectors rounded_room;

// Every thread looks for the live inputs itself: it takes less time than to wait for another.
LiveChannels live_channels(const Kernels& kernels, const Matrix& matrix, const Inputs& inputs, bool sparse) {
  std::int32_t* places = places_room.of(matrix.columns);
  float* values = values_room.of(matrix.columns * inputs.count);
  const std::int64_t count = kernels.channels.select(inputs.data, inputs.stride, inputs.count,
                                                     sparse ? matrix.limits : nullptr, matrix.columns, places, values);
  return {count, inputs.count, places, values};
}

}  // namespace

// Where the stored values of each row, or band of rows, begin; null if all rows are alike.
const std::int64_t* Matrix::starts() const {
  switch (kind) {
    case Kind::bitmask: return bitmask.starts;
    case Kind::groups: return groups.starts;
    case Kind::blocks: return blocks.starts;
    default: return nullptr;
  }
}

// Rows that must not, or better should not, be divided.
std::int64_t Matrix::unit() const {
  switch (kind) {
    case Kind::nibbles: return kNibblePanel;
    case Kind::blocks: return blocks.height;
    case Kind::patterns: return kPatternPanel;
    case Kind::channels: return kLineBlock;
    default: return 1;
  }
}

void Matrix::divide(int parts) {
  const std::int64_t* starts = this->starts();
  // bits are read and bands are begun even where nothing is stored
  const std::int64_t overhead = kind == Kind::bitmask ? columns / 16 : 1;
  const std::int64_t band = kind == Kind::blocks ? blocks.height : 1, bands = (rows + band - 1) / band;
  cuts_.assign(static_cast<std::size_t>(parts) + 1, 0);
  std::int64_t next = 0;
  for (int part = 1; part < parts; ++part) {
    std::int64_t row = begin_of(rows, part, parts);
    if (starts) {
      const std::int64_t all = starts[bands] - starts[0] + bands * overhead;
      while (next < bands && starts[next] - starts[0] + next * overhead < begin_of(all, part, parts)) ++next;
      row = std::min(next * band, rows);
    }
    cuts_[static_cast<std::size_t>(part)] = row / unit() * unit();
  }
  cuts_.back() = rows;
}

std::int64_t Matrix::piece() const {
  // their kernel looks for the live inputs once, and then takes all vectors together
  if (kind == Kind::channels) return std::max<std::int64_t>(rows, 1);
  const std::int64_t weights = kind == Kind::nibbles || rounded ? 4 * kWeightsOfPiece : kWeightsOfPiece;
  const std::int64_t together = kind == Kind::dense ? kDenseRowsOfKernel : kRowsOfKernel;
  return std::max(weights / std::max<std::int64_t>(1, columns) / together * together, together);
}

void Matrix::multiply(const Kernels& kernels, Range wanted, const Inputs& inputs, const Outputs& outputs,
                      bool sparse) const {
  const auto [first, last] = wanted;
  switch (kind) {
    case Kind::none: return;
    case Kind::dense:
      if (rounded) kernels.integers.dense(dense, first, last, rounded_room.fill(kernels, inputs, columns), outputs);
      else kernels.dense(dense, first, last, inputs, outputs);
      break;
    case Kind::bitmask:
      if (rounded) kernels.integers.bitmask(bitmask, first, last, rounded_room.fill(kernels, inputs, columns), outputs);
      else kernels.bitmask(bitmask, first, last, inputs, outputs);
      break;
    case Kind::groups: kernels.groups(groups, first, last, inputs, outputs); break;
    case Kind::nibbles: kernels.steps.nibbles(nibbles, first, last, inputs, outputs); break;
    case Kind::blocks: kernels.blocks.few(blocks, first, last, inputs, outputs); break;
    case Kind::patterns: kernels.patterns.multiply(patterns, first, last, inputs, outputs); break;
    case Kind::channels: {
      const LiveChannels live = live_channels(kernels, *this, inputs, sparse);
      kernels.channels.spread(lines, live, first, last, outputs.data, outputs.stride, false);
      break;
    }
    case Kind::nibble_rows: {
      std::int32_t* places = places_room.of(last - first);
      for (std::int64_t row = first; row < last; ++row) places[row - first] = static_cast<std::int32_t>(row);
      return multiply_some(kernels, places, last - first, inputs, outputs);  // which adds the bias itself
    }
  }
  add_bias(kernels, wanted, inputs.count, outputs);
}

void Matrix::multiply_half(const Kernels& kernels, int half, Range wanted, const Inputs& inputs, const Outputs& outputs,
                           bool sparse) const {
  const LiveChannels live = live_channels(kernels, *this, inputs, sparse);
  // the first half has no rest that its kernel would take line by line
  const std::int64_t whole = (live.count / 2 + kLinesTogether - 1) / kLinesTogether * kLinesTogether;
  const std::int64_t middle = std::min(whole, live.count);
  const std::int64_t begin = half ? middle : 0, end = half ? live.count : middle;
  const LiveChannels some{end - begin, live.rows, live.places + begin, live.inputs + begin * live.rows};
  kernels.channels.spread(lines, some, wanted.first, wanted.last, outputs.data, outputs.stride, false);
  if (!half) add_bias(kernels, wanted, inputs.count, outputs);
}

void Matrix::multiply_some(const Kernels& kernels, const std::int32_t* places, std::int64_t count, const Inputs& inputs,
                           const Outputs& outputs) const {
  const ChannelLines all = kind == Kind::dense
                               ? ChannelLines{rows, columns, dense.values, dense.scales, dense.group, dense.value}
                               : lines;
  kernels.channels.gather(all, places, count, inputs.data, inputs.stride, inputs.count, outputs.data, outputs.stride);
  if (!bias) return;
  for (int b = 0; b < inputs.count; ++b)
    for (std::int64_t k = 0; k < count; ++k) outputs.data[b * outputs.stride + places[k]] += bias[places[k]];
}

void Matrix::multiply_exactly(const Kernels& kernels, Range wanted, const Inputs& inputs,
                              const Outputs& outputs) const {
  std::vector<float> weights(static_cast<std::size_t>(padded(columns)), 0.0f);
  for (std::int64_t row = wanted.first; row < wanted.last; ++row) {
    expand_row(kernels, row, weights.data());
    for (int b = 0; b < inputs.count; ++b) {
      const float* x = inputs.data + b * inputs.stride;
      double total = bias ? bias[row] : 0.0;
      for (std::int64_t i = 0; i < columns; ++i) total += static_cast<double>(weights[i]) * x[i];
      outputs.data[b * outputs.stride + row] = static_cast<float>(total);
    }
  }
}

void Matrix::expand_row(const Kernels& kernels, std::int64_t row, float* target) const {
  switch (kind) {
    case Kind::none:
    case Kind::channels:
    case Kind::nibble_rows: return;
    case Kind::dense: return kernels.steps.expand_dense(dense, row, row + 1, target, columns);
    case Kind::bitmask: return kernels.expand_bitmask(bitmask, row, row + 1, target, columns);
    case Kind::groups: return kernels.expand_groups(groups, row, row + 1, target, columns);
    case Kind::nibbles: return kernels.steps.expand_nibbles(nibbles, row, row + 1, target, columns);
    case Kind::blocks: return kernels.blocks.expand(blocks, row, row + 1, target, columns);
    case Kind::patterns: return kernels.patterns.expand(patterns, row, row + 1, target, columns);
  }
}

void Matrix::add_bias(const Kernels& kernels, Range wanted, int count, const Outputs& outputs) const {
  if (!bias) return;
  const auto [first, last] = wanted;
  for (int b = 0; b < count; ++b)
    kernels.steps.add(outputs.data + b * outputs.stride + first, bias + first, last - first);
}

}  // namespace gossamer
