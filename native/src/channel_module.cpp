// Products in which only some channels take part, as Python calls them.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

// (lines, width, values, value, scales, group)
ChannelLines lines_of(const nb::tuple& given) {
  return {nb::cast<std::int64_t>(given[0]),
          nb::cast<std::int64_t>(given[1]),
          at<void>(nb::cast<Address>(given[2])),
          at<void>(nb::cast<Address>(given[4])),
          nb::cast<std::int64_t>(given[5]),
          static_cast<Value>(nb::cast<int>(given[3]))};
}

// The channels that some of at most kMostTogether vectors want, found once for all threads.
struct Chosen {
  std::vector<std::int32_t> places;
  std::vector<float> inputs;
  LiveChannels live{};

  const LiveChannels& find(const float* vectors, std::int64_t stride, int rows, const float* limits, std::int64_t channels) {
    places.resize(static_cast<std::size_t>(channels) + 16);
    inputs.resize(static_cast<std::size_t>(channels) * static_cast<std::size_t>(rows) + 16);
    const std::int64_t count = kernels().channels.select(vectors, stride, rows, limits, channels, places.data(), inputs.data());
    live = {count, rows, places.data(), inputs.data()};
    return live;
  }
};

// work(first, last) on ranges of `all`, each of whole blocks.
template <typename Work>
void over(std::int64_t all, std::int64_t block, int threads, Work&& work) {
  const std::int64_t blocks = (all + block - 1) / block;
  const int parts = static_cast<int>(std::clamp<std::int64_t>(blocks, 1, std::max(threads, 1)));
  parallel(parts, [&](int part, int count) {
    const std::int64_t first = blocks * part / count * block, last = std::min(blocks * (part + 1) / count * block, all);
    if (first < last) work(first, last);
  });
}

void input_sparse(const ChannelLines& matrix, const Inputs& inputs, const float* limits, Results& results, bool add,
                  int threads) {
  Chosen chosen;
  for (int b = 0; b < inputs.count; b += kMostTogether) {
    const int rows = std::min(kMostTogether, inputs.count - b);
    const LiveChannels& live = chosen.find(inputs.data + b * inputs.stride, inputs.stride, rows, limits, matrix.lines);
    const Outputs outputs = results.outputs();
    over(matrix.width, kLineBlock, threads, [&](std::int64_t first, std::int64_t last) {
      kernels().channels.spread(matrix, live, first, last, outputs.data + b * outputs.stride, outputs.stride, add);
      if (b + rows == inputs.count) results.finish(first, last);
    });
  }
}

// outputs = gates ⊙ (matrix · inputs + bias), 0 wherever a gate is.
void masked_output(const ChannelLines& matrix, const Inputs& inputs, const float* gates, const float* bias,
                   Results& results, int threads) {
  Chosen chosen;
  const Outputs outputs = results.outputs();
  for (int b = 0; b < inputs.count; b += kMostTogether) {
    const int rows = std::min(kMostTogether, inputs.count - b);
    const LiveChannels& live = chosen.find(gates + b * matrix.lines, matrix.lines, rows, nullptr, matrix.lines);
    float* there = outputs.data + b * outputs.stride;
    std::fill_n(there, rows * outputs.stride, 0.0f);
    over(live.count, 1, threads, [&](std::int64_t first, std::int64_t last) {
      kernels().channels.gather(matrix, live.places + first, last - first, inputs.data + b * inputs.stride, inputs.stride,
                                rows, there, outputs.stride);
      for (std::int64_t k = first; k < last; ++k)
        for (int row = 0; row < rows; ++row) {
          const float gate = live.inputs[k * rows + row];
          float& one = there[row * outputs.stride + live.places[k]];
          one = gate == 0.0f ? 0.0f : gate * (bias ? one + bias[live.places[k]] : one);
        }
    });
  }
  results.finish(0, matrix.lines);
}

// What becomes of the results of the gate.
struct Gating {
  Activation activation;
  float cut;             // of relu: what is at most this becomes 0
  const float* limits;   // of each neuron: activations of at most this size become 0; may be null
  const std::uint8_t* wanted;  // rows × neurons: whether a neuron is computed at all; may be null
};

struct Feedforward {
  ChannelLines gate, up, down;
  const float* gate_bias;
  const float* up_bias;
  Gating gating;

  std::int64_t neurons() const { return gate.lines; }

  // The neurons that some vector wants before the gate is known.
  std::vector<std::int32_t> candidates(std::int64_t begin, int rows) const {
    std::vector<std::int32_t> found;
    for (std::int64_t neuron = 0; neuron < neurons(); ++neuron) {
      bool some = !gating.wanted;
      for (int b = 0; b < rows && !some; ++b) some = gating.wanted[(begin + b) * neurons() + neuron];
      if (some) found.push_back(static_cast<std::int32_t>(neuron));
    }
    return found;
  }

  void activate(const std::int32_t* places, std::int64_t count, std::int64_t begin, int rows, float* hidden) const {
    std::vector<float> line(static_cast<std::size_t>(count)), ones(static_cast<std::size_t>(count), 1.0f);
    for (int b = 0; b < rows; ++b) {
      float* row = hidden + b * neurons();
      for (std::int64_t k = 0; k < count; ++k) line[k] = row[places[k]] + (gate_bias ? gate_bias[places[k]] : 0.0f);
      if (gating.activation == Activation::relu)
        for (float& one : line) one = one <= gating.cut ? 0.0f : one;
      else
        kernels().steps.activate(gating.activation, line.data(), ones.data(), count);
      for (std::int64_t k = 0; k < count; ++k) {
        const float size = line[k] < 0 ? -line[k] : line[k];
        const bool silent = (gating.limits && size <= gating.limits[places[k]]) ||
                            (gating.wanted && !gating.wanted[(begin + b) * neurons() + places[k]]);
        row[places[k]] = silent ? 0.0f : line[k];
      }
    }
  }

  void run(const Inputs& inputs, Results& results, int threads) const {
    Chosen chosen;
    std::vector<float> hidden, upper;
    const Outputs outputs = results.outputs();
    const ChannelKernels& kernel = kernels().channels;
    for (int b = 0; b < inputs.count; b += kMostTogether) {
      const int rows = std::min(kMostTogether, inputs.count - b);
      const float* x = inputs.data + b * inputs.stride;
      const std::vector<std::int32_t> some = candidates(b, rows);
      hidden.assign(static_cast<std::size_t>(rows * neurons()), 0.0f);
      upper.resize(hidden.size());
      over(static_cast<std::int64_t>(some.size()), 1, threads, [&](std::int64_t first, std::int64_t last) {
        kernel.gather(gate, some.data() + first, last - first, x, inputs.stride, rows, hidden.data(), neurons());
        activate(some.data() + first, last - first, b, rows, hidden.data());
      });
      chosen.find(hidden.data(), neurons(), rows, nullptr, neurons());
      over(chosen.live.count, 1, threads, [&](std::int64_t first, std::int64_t last) {
        kernel.gather(up, chosen.live.places + first, last - first, x, inputs.stride, rows, upper.data(), neurons());
        for (std::int64_t k = first; k < last; ++k)
          for (int row = 0; row < rows; ++row) {
            const std::int64_t place = chosen.live.places[k];
            float& value = chosen.inputs[static_cast<std::size_t>(k * rows + row)];
            if (value != 0.0f) value *= upper[static_cast<std::size_t>(row * neurons() + place)] + (up_bias ? up_bias[place] : 0.0f);
          }
      });
      over(down.width, kLineBlock, threads, [&](std::int64_t first, std::int64_t last) {
        kernel.spread(down, chosen.live, first, last, outputs.data + b * outputs.stride, outputs.stride, false);
        if (b + rows == inputs.count) results.finish(first, last);
      });
    }
  }
};

}  // namespace

void bind_channels(nb::module_& m) {
  m.def("channel_input_sparse", [](const nb::tuple& lines, Address limits, bool add, Address inputs, std::int64_t stride,
                                   int count, int input_value, Address bias, Address outputs, int output_value, int threads) {
    const ChannelLines matrix = lines_of(lines);
    nb::gil_scoped_release unlocked;
    const Prepared prepared(inputs, input_value, stride, count, matrix.lines);
    Results results(outputs, output_value, count, matrix.width, bias);
    input_sparse(matrix, prepared.inputs(), at<float>(limits), results, add, threads);
  });
  m.def("channel_masked_output", [](const nb::tuple& lines, Address gates, Address inputs, std::int64_t stride, int count,
                                    int input_value, Address bias, Address outputs, int output_value, int threads) {
    const ChannelLines matrix = lines_of(lines);
    nb::gil_scoped_release unlocked;
    const Prepared prepared(inputs, input_value, stride, count, matrix.width);
    Results results(outputs, output_value, count, matrix.lines, 0);
    masked_output(matrix, prepared.inputs(), at<float>(gates), at<float>(bias), results, threads);
  });
  m.def("channel_feedforward", [](const nb::tuple& gate, const nb::tuple& up, const nb::tuple& down, int activation, float cut,
                                  Address limits, Address wanted, Address gate_bias, Address up_bias, Address inputs,
                                  std::int64_t stride, int count, int input_value, Address bias, Address outputs,
                                  int output_value, int threads) {
    const Feedforward all{lines_of(gate), lines_of(up), lines_of(down), at<float>(gate_bias), at<float>(up_bias),
                          {static_cast<Activation>(activation), cut, at<float>(limits), at<std::uint8_t>(wanted)}};
    nb::gil_scoped_release unlocked;
    const Prepared prepared(inputs, input_value, stride, count, all.gate.width);
    Results results(outputs, output_value, count, all.down.width, bias);
    all.run(prepared.inputs(), results, threads);
  });
}

}  // namespace gossamer
