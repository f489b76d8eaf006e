// Products with matrices that keep n of every m adjacent weights, as Python calls them.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>

#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// `pattern`: n and m
PatternRows pattern_rows(std::int64_t rows, std::int64_t columns, Address pattern, Address values, int value,
                         Address places, Address scales, std::int64_t group) {
  const std::int32_t* sizes = at<std::int32_t>(pattern);
  return {rows,  columns, sizes[0], sizes[1], at<void>(values), at<std::uint32_t>(places), at<float>(scales),
          group, static_cast<Value>(value)};
}

}  // namespace

void bind_patterns(nb::module_& m) {
  m.def("nm_linear", [](std::int64_t rows, std::int64_t columns, Address pattern, Address values, int value,
                        Address places, Address scales, std::int64_t group, Address inputs, std::int64_t stride,
                        int count, int input_value, Address bias, Address outputs, int output_value, int threads) {
    const PatternRows matrix = pattern_rows(rows, columns, pattern, values, value, places, scales, group);
    const Prepared prepared(inputs, input_value, stride, count, columns);
    Results results(outputs, output_value, count, rows, bias);
    over_rows(Share{nullptr, matrix.panels(), 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t first = begin * kPatternPanel, last = std::min(end * kPatternPanel, rows);
      kernels().patterns.multiply(matrix, first, last, prepared.inputs(), results.outputs());
      results.finish(first, last);
    });
  });
  m.def("nm_expand", [](std::int64_t rows, std::int64_t columns, Address pattern, Address values, int value,
                        Address places, Address scales, std::int64_t group, std::int64_t first, std::int64_t last,
                        Address target, int threads) {
    const PatternRows matrix = pattern_rows(rows, columns, pattern, values, value, places, scales, group);
    over_rows(Share{nullptr, last - first, 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().patterns.expand(matrix, first + begin, first + end, into<float>(target) + begin * columns, columns);
    });
  });
}

}  // namespace gossamer
