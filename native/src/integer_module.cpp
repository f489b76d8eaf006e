// Products of int8 weights with inputs in int8 as Python sees them; gossamer.kernels.integer checks what comes here.

#include <nanobind/nanobind.h>

#include <cstdint>

#include "integer_inputs.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

template <typename Matrix>
void integer_linear(void (*kernel)(const Matrix&, std::int64_t, std::int64_t, const RoundedInputs&, const Outputs&),
                    const Matrix& matrix, const Share& share, Address inputs, std::int64_t stride, int count,
                    int input_value, Address bias, Address outputs, int output_value, int threads) {
  const Prepared prepared(inputs, input_value, stride, count, matrix.columns);
  RoundedVectors vectors;
  const RoundedInputs rounded = vectors.fill(kernels(), prepared.inputs(), matrix.columns);
  Results results(outputs, output_value, count, share.rows, bias);
  over_rows(share, threads, [&](std::int64_t first, std::int64_t last) {
    kernel(matrix, first, last, rounded, results.outputs());
    results.finish(first, last);
  });
}

}  // namespace

void bind_integers(nb::module_& m) {
  m.def("integer_dense_linear",
        [](std::int64_t rows, std::int64_t columns, Address values, Address scales, std::int64_t group, Address inputs,
           std::int64_t stride, int count, int input_value, Address bias, Address outputs, int output_value,
           int threads) {
          const DenseRows matrix{columns, at<void>(values), at<float>(scales), group, Value::int8};
          integer_linear(kernels().integers.dense, matrix, Share{nullptr, rows, 0}, inputs, stride, count, input_value,
                         bias, outputs, output_value, threads);
        });
  m.def("integer_bitmask_linear",
        [](std::int64_t rows, std::int64_t columns, Address bits, Address values, Address starts, Address scales,
           std::int64_t group, Address inputs, std::int64_t stride, int count, int input_value, Address bias,
           Address outputs, int output_value, int threads) {
          const BitmaskRows matrix{columns, at<std::uint64_t>(bits), at<void>(values), at<std::int64_t>(starts),
                                   at<float>(scales), group, Value::int8};
          integer_linear(kernels().integers.bitmask, matrix, Share{matrix.starts, rows, columns / 16}, inputs, stride,
                         count, input_value, bias, outputs, output_value, threads);
        });
}

}  // namespace gossamer
