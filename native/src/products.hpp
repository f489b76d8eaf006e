// Products as Python calls them: what the kernels take, and how rows are divided among threads.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"

namespace gossamer {

using Address = std::uintptr_t;

template <typename T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

template <typename T>
T* into(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows first … last of part `part`: every part gets the same share of the stored values, and a row counts for
// `overhead` values even if it is empty. Null starts: all rows are alike.
struct Share {
  const std::int64_t* starts;
  std::int64_t rows;
  std::int64_t overhead;

  std::int64_t begin(int part, int parts) const {
    if (part <= 0) return 0;
    if (part >= parts) return rows;
    if (!starts) return rows * part / parts;
    const std::int64_t base = starts[0], all = starts[rows] - base + rows * overhead;
    const std::int64_t wanted = all / parts * part + all % parts * part / parts;
    std::int64_t low = 0, high = rows;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (starts[middle] - base + middle * overhead < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

template <typename Work>
void over_rows(const Share& share, int threads, Work&& work) {
  nanobind::gil_scoped_release unlocked;
  const int parts = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), std::max<std::int64_t>(share.rows, 1)));
  parallel(parts, [&](int part, int count) {
    const std::int64_t first = share.begin(part, count), last = share.begin(part + 1, count);
    if (first < last) work(first, last);
  });
}

// The inputs as the kernels want them: float32, each vector followed by zeros up to a multiple of 64.
class Prepared {
 public:
  Prepared(Address inputs, int value, std::int64_t stride, int count, std::int64_t columns) {
    const std::int64_t padded = (columns + 63) / 64 * 64;
    if (static_cast<Value>(value) == Value::float32 && padded == columns) {
      inputs_ = {at<float>(inputs), stride, count};
      return;
    }
    buffer_.assign(static_cast<std::size_t>(padded) * static_cast<std::size_t>(count), 0.0f);
    for (int b = 0; b < count; ++b) {
      float* there = buffer_.data() + b * padded;
      if (static_cast<Value>(value) == Value::float32) {
        std::copy_n(at<float>(inputs) + b * stride, columns, there);
      } else {
        kernels().widen_bfloat16(at<std::uint16_t>(inputs) + b * stride, there, columns);
      }
    }
    inputs_ = {buffer_.data(), padded, count};
  }

  const Inputs& inputs() const { return inputs_; }

 private:
  std::vector<float> buffer_;
  Inputs inputs_{};
};

// The outputs in float32, and in the end what the caller asked for: a bias added, bfloat16 if that is the dtype.
class Results {
 public:
  Results(Address outputs, int value, int count, std::int64_t rows, Address bias)
      : target_(outputs), value_(static_cast<Value>(value)), count_(count), rows_(rows), bias_(bias) {
    if (value_ != Value::float32) buffer_.resize(static_cast<std::size_t>(count) * static_cast<std::size_t>(rows));
  }

  Outputs outputs() { return {value_ == Value::float32 ? into<float>(target_) : buffer_.data(), rows_}; }

  void finish(std::int64_t first, std::int64_t last) {
    const Outputs all = outputs();
    for (int b = 0; b < count_; ++b) {
      float* line = all.data + b * rows_;
      if (bias_)
        for (std::int64_t row = first; row < last; ++row) line[row] += at<float>(bias_)[row];
      if (value_ != Value::float32)
        kernels().narrow_bfloat16(line + first, into<std::uint16_t>(target_) + b * rows_ + first, last - first);
    }
  }

 private:
  Address target_;
  Value value_;
  int count_;
  std::int64_t rows_;
  Address bias_;
  std::vector<float> buffer_;
};

template <typename Matrix>
void linear(void (*kernel)(const Matrix&, std::int64_t, std::int64_t, const Inputs&, const Outputs&),
            const Matrix& matrix, const Share& share, Address inputs, std::int64_t stride, int count, int input_value,
            Address bias, Address outputs, int output_value, int threads) {
  const Prepared prepared(inputs, input_value, stride, count, matrix.columns);
  Results results(outputs, output_value, count, share.rows, bias);
  over_rows(share, threads, [&](std::int64_t first, std::int64_t last) {
    kernel(matrix, first, last, prepared.inputs(), results.outputs());
    results.finish(first, last);
  });
}

}  // namespace gossamer
