// What Python sees. Tensors come in as addresses: the module is built against no version of torch, and a call costs
// little. gossamer.kernels checks shapes, dtypes and contents before; nothing here can.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "cpu.hpp"
#include "parallel.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {

void bind_attention(nb::module_& m);
void bind_attention_backward(nb::module_& m);
void bind_attention_tokens(nb::module_& m);
void bind_block_choice(nb::module_& m);
void bind_blocks(nb::module_& m);
void bind_channel_histogram(nb::module_& m);
void bind_channels(nb::module_& m);
void bind_codes(nb::module_& m);
void bind_convolution(nb::module_& m);
void bind_convolution_bytes(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_integers(nb::module_& m);
void bind_patterns(nb::module_& m);
void bind_pursuit(nb::module_& m);
void bind_row_products(nb::module_& m);
void bind_selection(nb::module_& m);
void bind_training(nb::module_& m);

namespace {

BitmaskRows bitmask_rows(std::int64_t columns, Address bits, Address values, int value, Address starts, Address scales,
                         std::int64_t group) {
  return {columns, at<std::uint64_t>(bits), at<void>(values), at<std::int64_t>(starts), at<float>(scales), group,
          static_cast<Value>(value)};
}

GroupRows group_rows(std::int64_t columns, Address starts, Address places, Address words, Address scales,
                     Address zeros) {
  return {columns,
          at<std::int64_t>(starts),
          at<std::uint16_t>(places),
          at<std::uint64_t>(words),
          at<std::uint16_t>(scales),
          at<std::uint64_t>(zeros)};
}

NibbleRows nibble_rows(std::int64_t columns, Address words, Address scales, Address offsets, std::int64_t group) {
  return {columns, at<std::uint32_t>(words), at<std::uint16_t>(scales), at<std::uint16_t>(offsets), group};
}

}  // namespace
}  // namespace gossamer

NB_MODULE(_native, m) {
  using namespace gossamer;
  m.doc() = "Sparse kernels for the processor; use gossamer.kernels.";

  m.def("instruction_sets", &usable_instruction_sets);
  m.def("instruction_set", &instruction_set);
  m.def("use_instruction_set", &use_instruction_set, nb::arg("name"));
  m.def("thread_source", &thread_source);
  bind_attention(m);
  bind_attention_backward(m);
  bind_attention_tokens(m);
  bind_block_choice(m);
  bind_blocks(m);
  bind_channel_histogram(m);
  bind_channels(m);
  bind_codes(m);
  bind_convolution(m);
  bind_convolution_bytes(m);
  bind_decoder(m);
  bind_integers(m);
  bind_patterns(m);
  bind_pursuit(m);
  bind_row_products(m);
  bind_selection(m);
  bind_training(m);

  m.def("bitmask_linear",
        [](std::int64_t rows, std::int64_t columns, Address bits, Address values, int value, Address starts,
           Address scales, std::int64_t group, Address inputs, std::int64_t stride, int count, int input_value,
           Address bias, Address outputs, int output_value, int threads, bool by_values) {
          const BitmaskRows matrix = bitmask_rows(columns, bits, values, value, starts, scales, group);
          const Share share{by_values ? matrix.starts : nullptr, rows, columns / 16};
          linear(kernels().bitmask, matrix, share, inputs, stride, count, input_value, bias, outputs, output_value,
                 threads);
        });
  m.def("bitmask_expand", [](std::int64_t rows, std::int64_t columns, Address bits, Address values, int value,
                             Address starts, Address scales, std::int64_t group, std::int64_t first, std::int64_t last,
                             Address target, int threads) {
    const BitmaskRows matrix = bitmask_rows(columns, bits, values, value, starts, scales, group);
    (void)rows;
    over_rows(Share{nullptr, last - first, 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().expand_bitmask(matrix, first + begin, first + end, into<float>(target) + begin * columns, columns);
    });
  });
  m.def("dense_linear", [](std::int64_t rows, std::int64_t columns, Address values, int value, Address scales,
                           std::int64_t group, Address inputs, std::int64_t stride, int count, int input_value,
                           Address bias, Address outputs, int output_value, int threads) {
    const DenseRows matrix{columns, at<void>(values), at<float>(scales), group, static_cast<Value>(value)};
    linear(kernels().dense, matrix, Share{nullptr, rows, 0}, inputs, stride, count, input_value, bias, outputs,
           output_value, threads);
  });
  m.def("group_linear",
        [](std::int64_t rows, std::int64_t columns, Address starts, Address places, Address words, Address scales,
           Address zeros, Address inputs, std::int64_t stride, int count, int input_value, Address bias,
           Address outputs, int output_value, int threads, bool by_values) {
          const GroupRows matrix = group_rows(columns, starts, places, words, scales, zeros);
          const Share share{by_values ? matrix.starts : nullptr, rows, 1};
          linear(kernels().groups, matrix, share, inputs, stride, count, input_value, bias, outputs, output_value,
                 threads);
        });
  m.def("group_expand", [](std::int64_t rows, std::int64_t columns, Address starts, Address places, Address words,
                           Address scales, Address zeros, std::int64_t first, std::int64_t last, Address target,
                           int threads) {
    const GroupRows matrix = group_rows(columns, starts, places, words, scales, zeros);
    (void)rows;
    over_rows(Share{nullptr, last - first, 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().expand_groups(matrix, first + begin, first + end, into<float>(target) + begin * columns, columns);
    });
  });
  m.def("nibble_linear",
        [](std::int64_t rows, std::int64_t columns, Address words, Address scales, Address offsets,
           std::int64_t group, Address inputs, std::int64_t stride, int count, int input_value, Address bias,
           Address outputs, int output_value, int threads) {
          const NibbleRows matrix = nibble_rows(columns, words, scales, offsets, group);
          linear(kernels().steps.nibbles, matrix, Share{nullptr, rows, 0}, inputs, stride, count, input_value, bias,
                 outputs, output_value, threads);
        });
  m.def("nibble_expand", [](std::int64_t rows, std::int64_t columns, Address words, Address scales, Address offsets,
                            std::int64_t group, std::int64_t first, std::int64_t last, Address target,
                            int threads) {
    const NibbleRows matrix = nibble_rows(columns, words, scales, offsets, group);
    (void)rows;
    over_rows(Share{nullptr, last - first, 0}, threads, [&](std::int64_t begin, std::int64_t end) {
      kernels().steps.expand_nibbles(matrix, first + begin, first + end, into<float>(target) + begin * columns, columns);
    });
  });
  m.def("keep_highest", [](std::int64_t rows, int m, int dropped, Address scores, Address keep, int threads) {
    if (!kernels().keep_highest(nullptr, 0, m, dropped, nullptr)) return false;
    over_rows(Share{nullptr, rows, 0}, threads, [&](std::int64_t first, std::int64_t last) {
      kernels().keep_highest(at<float>(scores) + first * m, last - first, m, dropped, into<std::uint8_t>(keep) + first * m);
    });
    return true;
  });
}
