// How convolutions are divided into strips and among threads, and where the inputs of each tap lie: what those of real
// and of whole numbers have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace gossamer {

using Address = std::uintptr_t;

// Memory that a thread keeps from one call to the next: fresh pages would cost more than many a convolution.
inline float* scratch(int number, std::size_t count) {
  thread_local std::vector<float> kept[3];
  std::vector<float>& memory = kept[number];
  if (memory.size() < count + 16) memory.resize(count + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + ((64 - address % 64) % 64) / sizeof(float);
}

struct Geometry {
  std::int64_t batch, height, width, out_height, out_width;
  int kernel[2], stride[2], padding[2], dilation[2];

  std::int64_t positions() const { return out_height * out_width; }
  bool pointwise() const {
    return kernel[0] == 1 && kernel[1] == 1 && stride[0] == 1 && stride[1] == 1 && !padding[0] && !padding[1];
  }
};

// How the work is divided: strips among threads, or the blocks of every strip if there are too few of them.
struct Division {
  std::int64_t strips;
  bool by_strips;

  Division(std::int64_t strips, int parts) : strips(strips), by_strips(strips % parts == 0 || strips >= 8 * parts) {}

  std::int64_t first_strip(int part, int parts) const { return by_strips ? strips * part / parts : 0; }
  std::int64_t last_strip(int part, int parts) const { return by_strips ? strips * (part + 1) / parts : strips; }
};

// First block of a part, so that all parts have equally many kept channels.
template <typename Matrix>
std::int64_t first_block(const Matrix& matrix, std::int64_t blocks, int part, int parts) {
  if (part >= parts) return blocks;
  const std::int64_t wanted = (matrix.starts[blocks] + blocks) * part / parts;
  std::int64_t low = 0, high = blocks;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (matrix.starts[middle] + middle < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <typename Matrix, typename Work>
void divide(const Matrix& matrix, const Division& division, int threads, Work&& work) {
  const std::int64_t blocks = (matrix.outputs + matrix.block - 1) / matrix.block;
  parallel(threads, [&](int part, int parts) {
    const std::int64_t begin = division.by_strips ? 0 : first_block(matrix, blocks, part, parts);
    const std::int64_t end = division.by_strips ? blocks : first_block(matrix, blocks, part + 1, parts);
    work(division.first_strip(part, parts), division.last_strip(part, parts), begin, end);
  });
}

// All inputs that a convolution with larger kernels, or a stride, needs: zeros around the images, and every phase of
// the stride by itself, so that each tap is the same image at another offset. Images lie side by side.
struct Phases {
  std::int64_t height, width;  // of one phase
  std::vector<std::int64_t> taps, rows, columns;  // by tap; row and column of the phase of each phase
  std::int64_t stride;         // from one channel to the next

  Phases(const Geometry& shape, std::int64_t channels) {
    const auto last = [&](int side) { return (shape.kernel[side] - 1) * shape.dilation[side] / shape.stride[side]; };
    height = shape.out_height + last(0);
    width = shape.out_width + last(1);
    stride = shape.batch * height * width;
    for (int row = 0; row < shape.kernel[0]; ++row)
      for (int column = 0; column < shape.kernel[1]; ++column) {
        const int down = row * shape.dilation[0], right = column * shape.dilation[1];
        const std::int64_t phase = find(down % shape.stride[0], right % shape.stride[1]);
        taps.push_back(phase * channels * stride + down / shape.stride[0] * width + right / shape.stride[1]);
      }
  }

  std::size_t size(std::int64_t channels) const {
    return rows.size() * static_cast<std::size_t>(channels * stride) + static_cast<std::size_t>(width) * 2 +
           kMostVectors * 16 + static_cast<std::size_t>(*std::max_element(taps.begin(), taps.end()) % stride);
  }

 private:
  std::int64_t find(int row, int column) {
    for (std::size_t phase = 0; phase < rows.size(); ++phase)
      if (rows[phase] == row && columns[phase] == column) return static_cast<std::int64_t>(phase);
    rows.push_back(row);
    columns.push_back(column);
    return static_cast<std::int64_t>(rows.size()) - 1;
  }
};

inline void take_every(std::int64_t step, const float* __restrict source, std::int64_t count, float* __restrict target) {
  if (step == 1) std::copy_n(source, count, target);
  else if (step == 2)  // apart, because compilers vectorise it
    for (std::int64_t i = 0; i < count; ++i) target[i] = source[2 * i];
  else
    for (std::int64_t i = 0; i < count; ++i) target[i] = source[step * i];
}

// The columns of a row of a phase that lie within the image; `first` is the column of the image under its first.
struct Inside {
  std::int64_t begin, end;

  Inside(const Geometry& shape, std::int64_t first, std::int64_t width) {
    const std::int64_t step = shape.stride[1];
    begin = std::min(width, first >= 0 ? 0 : (-first + step - 1) / step);
    end = std::max(begin, std::min(width, (shape.width - first + step - 1) / step));
  }
};

// Where the positions `first` … `last` of images in phases lie in the output: row after row, without the columns between
// them. There are at most as many runs as positions; returns how many.
inline int runs_of(const Geometry& shape, const Phases& phases, std::int64_t outputs, std::int64_t first,
                   std::int64_t last, Run* runs) {
  const std::int64_t image_size = phases.height * phases.width;
  int count = 0;
  for (std::int64_t position = first; position < last;) {
    const std::int64_t image = position / image_size, row = position % image_size / phases.width;
    const std::int64_t column = position % phases.width;
    const std::int64_t next = std::min(last, position - column + phases.width);
    if (row < shape.out_height && column < shape.out_width) {
      const std::int64_t to = (image * outputs * shape.out_height + row) * shape.out_width + column;
      runs[count++] = {position - first, to, std::min(next - position, shape.out_width - column)};
    }
    position = next;
  }
  return count;
}

}  // namespace gossamer
