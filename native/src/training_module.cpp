// Training with weights of which most are zero, as Python calls it: what is divided among threads.
//
// Every sum is formed by one thread, and in one order, so that no result depends on their number.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Address = std::uintptr_t;

constexpr std::int64_t kWordsOfThread = 1 << 9;   // fewer are not worth waking a thread
constexpr std::int64_t kTilesOfSegment = 4;       // of a gradient, that are summed before segments are
constexpr std::int64_t kMostSegments = 4;
constexpr std::int64_t kStreamed = 1 << 18;       // outputs from which on they would only displace the inputs

// Memory that a thread keeps from one call to the next: fresh pages would cost more than many a product.
float* scratch(int number, std::size_t count) {
  thread_local std::vector<float> kept[4];
  std::vector<float>& memory = kept[number];
  if (memory.size() < count + 16) memory.resize(count + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + ((64 - address % 64) % 64) / sizeof(float);
}

// A matrix in ranges of `width` adjacent columns: first all rows of the first range, then those of the next.
struct Matrix {
  std::int64_t rows, columns, width;
  const std::int32_t* starts;   // ranges × rows + 1
  const std::uint16_t* places;
  const std::int32_t* order;    // which value stands where, or null if they lie as they are stored

  std::int64_t ranges() const { return (columns + width - 1) / width; }
  std::int64_t nonzeros() const { return starts[ranges() * rows]; }
  std::int64_t begin(std::int64_t range) const { return range * width; }
  std::int64_t end(std::int64_t range) const { return std::min(columns, begin(range) + width); }
  SparseRows range(std::int64_t number, const float* values) const { return {starts + number * rows, places, values}; }

  // Non-zeros, and a little for every row, in front of one.
  std::int64_t before(std::int64_t row) const {
    std::int64_t found = 8 * row;
    for (std::int64_t number = 0; number < ranges(); ++number)
      found += starts[number * rows + row] - starts[number * rows];
    return found;
  }

  // First row of a part, so that all parts have equally much.
  std::int64_t first_row(std::int64_t part, std::int64_t parts) const {
    if (part >= parts) return rows;
    const std::int64_t wanted = before(rows) * part / parts;
    std::int64_t low = 0, high = rows;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (before(middle) < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

// Where features of positions lie: those of a batch, or the pixels of several images.
struct Places {
  std::int64_t image, position, feature;  // strides
  bool streamed = false;

  Features at(Address data, std::int64_t number, std::int64_t first) const {
    return {reinterpret_cast<const float*>(data) + number * image + first * position, position, feature, streamed};
  }
};

struct Tiles {
  std::int64_t images, positions;

  std::int64_t of_image() const { return (positions + kTile - 1) / kTile; }
  std::int64_t count() const { return images * of_image(); }
  std::int64_t image(std::int64_t tile) const { return tile / of_image(); }
  std::int64_t first(std::int64_t tile) const { return tile % of_image() * kTile; }
  int size(std::int64_t tile) const {
    return static_cast<int>(std::min<std::int64_t>(kTile, positions - first(tile)));
  }
};

template <typename Work>
void over(std::int64_t items, int threads, Work&& work) {
  parallel(static_cast<int>(std::clamp<std::int64_t>(items, 1, std::max(threads, 1))), [&](int part, int parts) {
    for (std::int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) work(item);
  });
}

constexpr std::int64_t kMoved = 1 << 14;  // values that a thread puts in order at a time

const float* in_order(const Matrix& matrix, const float* values, int threads) {
  if (!matrix.order) return values;
  const std::int64_t count = matrix.nonzeros();
  float* ordered = scratch(0, static_cast<std::size_t>(count));
  over((count + kMoved - 1) / kMoved, threads, [&](std::int64_t item) {
    for (std::int64_t i = item * kMoved; i < std::min(count, (item + 1) * kMoved); ++i)
      ordered[i] = values[matrix.order[i]];
  });
  return ordered;
}

// y[position] = W x[position] + b for every position.
void multiply(const Matrix& matrix, const float* values, const float* bias, const Tiles& tiles, Address x,
              const Places& from, Address y, const Places& to, int threads) {
  const float* ordered = in_order(matrix, values, threads);
  const std::int64_t count = tiles.count();
  // tiles are divided among threads, or the rows of every tile if there are too few of them
  const std::int64_t shares = count % threads == 0 || count >= 8 * threads ? 1 : threads;
  const std::int64_t groups = shares == 1 ? std::min<std::int64_t>(count, threads) : 1;
  over(groups * shares, threads, [&](std::int64_t item) {
    const std::int64_t group = item / shares, share = item % shares;
    const std::int64_t first = matrix.first_row(share, shares), last = matrix.first_row(share + 1, shares);
    float* tile = scratch(1, static_cast<std::size_t>(std::min(matrix.width, matrix.columns) * kTile));
    float* sums = matrix.ranges() > 1 ? scratch(2, static_cast<std::size_t>(matrix.rows * kTile)) : nullptr;
    for (std::int64_t number = count * group / groups; number < count * (group + 1) / groups; ++number) {
      const std::int64_t image = tiles.image(number), position = tiles.first(number);
      for (std::int64_t range = 0; range < matrix.ranges(); ++range) {
        kernels().training.pack(from.at(x, image, position), tiles.size(number), matrix.begin(range),
                                matrix.end(range), tile);
        kernels().training.multiply(matrix.range(range, ordered), first, last, tile, tiles.size(number), bias,
                                    range ? sums : nullptr, range + 1 < matrix.ranges() ? sums : nullptr,
                                    to.at(y, image, position));
      }
    }
  });
}

// gradient[nz] = Σ dy[position][row] · x[position][column]. Positions are divided into segments, as many as their
// number alone says; the sums of the segments are added in their order.
void outer(const Matrix& matrix, const Tiles& tiles, Address x, const Places& from, Address dy, const Places& of,
           float* gradient, int threads) {
  const std::int64_t count = tiles.count(), nonzeros = matrix.nonzeros();
  std::int64_t segments = 1;
  while (segments < kMostSegments && 2 * segments <= count && segments * kTilesOfSegment < count) segments *= 2;
  const bool direct = segments == 1 && !matrix.order;
  float* partial = direct ? gradient : scratch(0, static_cast<std::size_t>(segments * nonzeros));
  const std::int64_t shares = (threads + segments - 1) / segments;
  over(segments * shares, threads, [&](std::int64_t item) {
    const std::int64_t segment = item / shares, share = item % shares;
    const std::int64_t first = matrix.first_row(share, shares), last = matrix.first_row(share + 1, shares);
    float* tile = scratch(1, static_cast<std::size_t>(std::min(matrix.width, matrix.columns) * kTile));
    const std::int64_t begin = count * segment / segments, end = count * (segment + 1) / segments;
    for (std::int64_t number = begin; number < end; ++number) {
      const std::int64_t image = tiles.image(number), position = tiles.first(number);
      for (std::int64_t range = 0; range < matrix.ranges(); ++range) {
        kernels().training.pack(from.at(x, image, position), tiles.size(number), matrix.begin(range),
                                matrix.end(range), tile);
        kernels().training.outer(matrix.range(range, nullptr), first, last, tile, tiles.size(number),
                                 of.at(dy, image, position), partial + segment * nonzeros, number > begin);
      }
    }
  });
  if (direct) return;
  over((nonzeros + kMoved - 1) / kMoved, threads, [&](std::int64_t item) {
    for (std::int64_t i = item * kMoved; i < std::min(nonzeros, (item + 1) * kMoved); ++i) {
      float sum = partial[i];
      for (std::int64_t segment = 1; segment < segments; ++segment) sum += partial[segment * nonzeros + i];
      gradient[matrix.order ? matrix.order[i] : i] = sum;
    }
  });
}

Matrix matrix_of(std::int64_t rows, std::int64_t columns, std::int64_t width, Address starts, Address places,
                 Address order) {
  return {rows, columns, width, reinterpret_cast<const std::int32_t*>(starts),
          reinterpret_cast<const std::uint16_t*>(places), reinterpret_cast<const std::int32_t*>(order)};
}

}  // namespace

void bind_training(nb::module_& m) {
  m.def("mask_values", [](Address values, int bytes, Address bits, std::int64_t count, int threads) {
    nb::gil_scoped_release unlocked;
    const std::int64_t words = (count + 63) / 64;
    const auto parts = static_cast<int>(std::clamp<std::int64_t>(words / kWordsOfThread, 1, std::max(threads, 1)));
    parallel(parts, [&](int part, int all) {
      kernels().training.mask(reinterpret_cast<void*>(values), bytes, reinterpret_cast<const std::uint8_t*>(bits),
                              words * part / all, words * (part + 1) / all, count);
    });
  });
  m.def("sparse_multiply",
        [](std::int64_t rows, std::int64_t columns, std::int64_t width, Address starts, Address places, Address order,
           Address values, Address bias, std::int64_t images, std::int64_t positions, Address x,
           std::int64_t x_image, std::int64_t x_position, std::int64_t x_feature, Address y, std::int64_t y_image,
           std::int64_t y_position, std::int64_t y_feature, int threads) {
          nb::gil_scoped_release unlocked;
          multiply(matrix_of(rows, columns, width, starts, places, order), reinterpret_cast<const float*>(values),
                   reinterpret_cast<const float*>(bias), {images, positions}, x, {x_image, x_position, x_feature}, y,
                   {y_image, y_position, y_feature, images * positions * rows > kStreamed}, std::max(threads, 1));
        });
  m.def("sparse_outer",
        [](std::int64_t rows, std::int64_t columns, std::int64_t width, Address starts, Address places, Address order,
           std::int64_t images, std::int64_t positions, Address x, std::int64_t x_image, std::int64_t x_position,
           std::int64_t x_feature, Address dy, std::int64_t dy_image, std::int64_t dy_position,
           std::int64_t dy_feature, Address gradient, int threads) {
          nb::gil_scoped_release unlocked;
          outer(matrix_of(rows, columns, width, starts, places, order), {images, positions}, x,
                {x_image, x_position, x_feature}, dy, {dy_image, dy_position, dy_feature},
                reinterpret_cast<float*>(gradient), std::max(threads, 1));
        });
}

}  // namespace gossamer
