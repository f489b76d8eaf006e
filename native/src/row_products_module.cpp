// Products whose rows lie somewhere in a larger matrix, as Python calls them: rows are divided among threads.
//
// gossamer.kernels.row_products checks shapes, dtypes and indices before; nothing here can. Every result is formed by
// one thread and in one order, so that nothing depends on how many there are.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <tuple>

#include <nanobind/stl/tuple.h>

#include "attention_problem.hpp"
#include "cpu.hpp"
#include "products.hpp"
#include "row_products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

constexpr std::int64_t kRoom = std::int64_t{1} << 17;  // numbers of a tile's rows, which stay in the second cache
constexpr std::int64_t kFew = 8, kMost = 96;           // rows of a tile
constexpr std::int64_t kPanelsTogether = 8;            // that a thread packs at a time
constexpr std::int64_t kRowsTogether = 16;             // that a thread normalises at a time

const RowProductKernels& row_product_kernels() {
  const std::string& name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::row_product_table();
  if (name == "avx512") return avx512::row_product_table();
  if (name == "avx2") return avx2::row_product_table();
#endif
  if (name != "plain") throw std::invalid_argument("no products of rows for instruction set '" + name + "'");
  return plain::row_product_table();
}

// Address, dtype, numbers from one line to the next, address of the places or 0, lines, numbers of a line.
using Matrix = std::tuple<Address, int, std::int64_t, Address, std::int64_t, std::int64_t>;

Lines lines_of(const Matrix& matrix) {
  const auto [data, value, stride, places, count, size] = matrix;
  return {{at<void>(data), stride, count, size, static_cast<Value>(value)}, at<std::int64_t>(places)};
}

Destination destination(const Matrix& matrix, bool add) {
  const auto [data, value, stride, places, count, size] = matrix;
  (void)count, (void)size;
  return {into<void>(data), stride, at<std::int64_t>(places), static_cast<Value>(value), add};
}

// One operand of a product: turned, its lines are the products' depth.
struct Operand {
  Lines lines;
  bool turned;

  std::int64_t depth() const { return turned ? lines.vectors.count : lines.vectors.size; }
  std::int64_t width() const { return turned ? lines.vectors.size : lines.vectors.count; }
};

// How many rows a tile has: equally many, and as many tiles as threads share without a rest, if there are enough rows.
std::int64_t tile_rows(std::int64_t rows, std::int64_t depth, int threads) {
  const std::int64_t most = std::clamp<std::int64_t>(kRoom / std::max<std::int64_t>(depth, 1) / kFew * kFew, kFew, kMost);
  std::int64_t tiles = (rows + most - 1) / most;
  tiles = (tiles + threads - 1) / threads * threads;
  return std::clamp<std::int64_t>(((rows + tiles - 1) / tiles + kFew - 1) / kFew * kFew, kFew, most);
}

void multiply(const Operand& left, const Operand& right, const float* bias, const Destination& to, int threads) {
  const RowProductKernels& kernels = row_product_kernels();
  const std::int64_t rows = left.width(), depth = left.depth(), width = right.width();
  if (!rows || !width) return;
  const std::int64_t panels = (width + kPanel - 1) / kPanel, chunks = (panels + kPanelsTogether - 1) / kPanelsTogether;
  const Floats packed(panels * depth * kPanel);
  share_items(chunks, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t first = item * kPanelsTogether, last = std::min(first + kPanelsTogether, panels);
      float* target = packed.get() + first * depth * kPanel;
      (right.turned ? kernels.along : kernels.across)(right.lines, first, last, target);
    };
  });
  const std::int64_t some = tile_rows(rows, depth, threads);
  share_items((rows + some - 1) / some, threads, [&] {
    auto room = std::make_shared<Floats>(some * (depth + kMostWide * kPanel));
    return [&, room](std::int64_t item) {
      const std::int64_t first = item * some, last = std::min(first + some, rows);
      (left.turned ? kernels.turned : kernels.rows)(left.lines, first, last, room->get());
      kernels.multiply({room->get(), first, static_cast<int>(last - first), depth, packed.get(), width, bias, to,
                        room->get() + some * depth});
    };
  });
}

template <typename Work>
void over_lines(std::int64_t count, int threads, Work&& work) {
  share_items((count + kRowsTogether - 1) / kRowsTogether, threads, [&] {
    return [&](std::int64_t item) {
      work(item * kRowsTogether, std::min((item + 1) * kRowsTogether, count));
    };
  });
}

}  // namespace

void bind_row_products(nb::module_& m) {
  m.def("row_product", [](const Matrix& left, bool left_turned, const Matrix& right, bool right_turned, Address bias,
                          const Matrix& outputs, bool add, int threads) {
    nb::gil_scoped_release unlocked;
    multiply({lines_of(left), left_turned}, {lines_of(right), right_turned}, at<float>(bias),
             destination(outputs, add), std::max(threads, 1));
  });
  m.def("row_norm", [](const Matrix& lines, Address gain, float eps, Address outputs, Address units, Address factors,
                       int threads) {
    nb::gil_scoped_release unlocked;
    const NormRows norm{lines_of(lines), at<float>(gain), eps, into<void>(outputs), into<void>(units),
                        into<float>(factors)};
    over_lines(norm.lines.vectors.count, std::max(threads, 1),
               [&](std::int64_t first, std::int64_t last) { row_product_kernels().normalise(norm, first, last); });
  });
  m.def("row_norm_gradient", [](const Matrix& outputs, Address kept, Address inverse, Address gain, Address factors,
                                const Matrix& target, int threads) {
    nb::gil_scoped_release unlocked;
    const NormGradient norm{lines_of(outputs),  at<void>(kept),     at<float>(inverse),
                            at<float>(gain),    at<float>(factors), destination(target, true)};
    over_lines(norm.outputs.vectors.count, std::max(threads, 1),
               [&](std::int64_t first, std::int64_t last) { row_product_kernels().norm_gradient(norm, first, last); });
  });
}

}  // namespace gossamer
