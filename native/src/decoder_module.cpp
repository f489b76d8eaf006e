// The decoder as Python sees it. gossamer.runtime.program checks shapes and contents before; nothing here can.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "decoder.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Address = std::uintptr_t;

template <typename T>
const T* at(nb::handle address) {
  return reinterpret_cast<const T*>(nb::cast<Address>(address));
}

// Numbers of kinds that are only told apart in Python: here they are dense and bitmask with `rounded`.
constexpr int kIntegerDense = 9, kIntegerBitmask = 10;

// (kind, rows, columns, value, group, bias, five addresses)
Matrix matrix_of(nb::handle given) {
  const auto parts = nb::cast<nb::tuple>(given);
  if (parts.size() == 0) return {};
  Matrix matrix;
  const int kind = nb::cast<int>(parts[0]);
  matrix.rounded = kind == kIntegerDense || kind == kIntegerBitmask;
  matrix.kind = kind == kIntegerDense     ? Matrix::Kind::dense
                : kind == kIntegerBitmask ? Matrix::Kind::bitmask
                                          : static_cast<Matrix::Kind>(kind);
  matrix.rows = nb::cast<std::int64_t>(parts[1]);
  matrix.columns = nb::cast<std::int64_t>(parts[2]);
  const auto value = static_cast<Value>(nb::cast<int>(parts[3]));
  const auto group = nb::cast<std::int64_t>(parts[4]);
  matrix.bias = at<float>(parts[5]);
  switch (matrix.kind) {
    case Matrix::Kind::none: break;
    case Matrix::Kind::dense:
      matrix.dense = {matrix.columns, at<void>(parts[6]), at<float>(parts[7]), group, value};
      break;
    case Matrix::Kind::bitmask:
      matrix.bitmask = {matrix.columns,           at<std::uint64_t>(parts[6]), at<void>(parts[7]),
                        at<std::int64_t>(parts[8]), at<float>(parts[9]),         group,
                        value};
      break;
    case Matrix::Kind::groups:
      matrix.groups = {matrix.columns,           at<std::int64_t>(parts[6]),  at<std::uint16_t>(parts[7]),
                       at<std::uint64_t>(parts[8]), at<std::uint16_t>(parts[9]), at<std::uint64_t>(parts[10])};
      break;
    case Matrix::Kind::nibbles:
      matrix.nibbles = {matrix.columns, at<std::uint32_t>(parts[6]), at<std::uint16_t>(parts[7]),
                        at<std::uint16_t>(parts[8]), group};
      break;
    case Matrix::Kind::blocks:  // whose group is the height of a block
      matrix.blocks = {matrix.rows,
                       matrix.columns,
                       at<std::int64_t>(parts[6]),
                       at<void>(parts[7]),
                       at<void>(parts[8]),
                       at<float>(parts[9]),
                       static_cast<int>(group),
                       matrix.columns > 65536,
                       value};
      break;
    case Matrix::Kind::patterns: {
      const auto* sizes = at<std::int32_t>(parts[9]);
      matrix.patterns = {matrix.rows,
                         matrix.columns,
                         sizes[0],
                         sizes[1],
                         at<void>(parts[6]),
                         at<std::uint32_t>(parts[7]),
                         at<float>(parts[8]),
                         group,
                         value};
      break;
    }
    case Matrix::Kind::channels:
      matrix.lines = {matrix.columns, matrix.rows, at<void>(parts[6]), at<void>(parts[7]), group, value};
      matrix.limits = at<float>(parts[8]);
      break;
    case Matrix::Kind::nibble_rows:
      matrix.lines = {matrix.rows, matrix.columns, at<void>(parts[6]), at<void>(parts[7]), group, value};
      break;
  }
  return matrix;
}

// (weight, epsilon)
Norm norm_of(nb::handle given) {
  const auto parts = nb::cast<nb::tuple>(given);
  if (parts.size() == 0) return {};
  return {at<float>(parts[0]), nb::cast<float>(parts[1])};
}

Layer layer_of(nb::handle given) {
  const auto parts = nb::cast<nb::dict>(given);
  Layer layer;
  const std::pair<const char*, Matrix*> matrices[] = {
      {"query", &layer.query}, {"key", &layer.key}, {"value", &layer.value}, {"output", &layer.output},
      {"gate", &layer.gate},   {"up", &layer.up},   {"down", &layer.down}};
  for (const auto& [name, matrix] : matrices) *matrix = matrix_of(parts[name]);
  const std::pair<const char*, Norm*> norms[] = {
      {"before_attention", &layer.before_attention},     {"after_attention", &layer.after_attention},
      {"before_feedforward", &layer.before_feedforward}, {"after_feedforward", &layer.after_feedforward},
      {"query_norm", &layer.query_norm},                 {"key_norm", &layer.key_norm}};
  for (const auto& [name, norm] : norms) *norm = norm_of(parts[name]);
  layer.heads = nb::cast<std::int64_t>(parts["heads"]);
  layer.key_heads = nb::cast<std::int64_t>(parts["key_heads"]);
  layer.dim = nb::cast<std::int64_t>(parts["dim"]);
  layer.window = nb::cast<std::int64_t>(parts["window"]);
  layer.scale = nb::cast<float>(parts["scale"]);
  layer.cap = nb::cast<float>(parts["cap"]);
  layer.cosines = at<float>(parts["cosines"]);
  layer.sines = at<float>(parts["sines"]);
  layer.rotary = nb::cast<std::int64_t>(parts["rotary"]);
  layer.activation = static_cast<Activation>(nb::cast<int>(parts["activation"]));
  if (parts.contains("gate_limits")) layer.gate_limits = at<float>(parts["gate_limits"]);
  return layer;
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* self, nb::tuple embedding, float embedding_scale, nb::tuple last_norm, nb::tuple head,
              float logit_cap, nb::list layers) {
             std::vector<Layer> all;
             for (nb::handle layer : layers) all.push_back(layer_of(layer));
             if (all.empty()) throw std::invalid_argument("a decoder needs at least one layer");
             new (self) Decoder(matrix_of(embedding), embedding_scale, norm_of(last_norm), matrix_of(head), logit_cap,
                                std::move(all));
           })
      .def("step",
           [](Decoder& self, Address tokens, int count, std::int64_t position, Address cache, std::int64_t capacity,
              int value, Address logits, bool every, int threads, bool exact) {
             nb::gil_scoped_release unlocked;
             const Request request{reinterpret_cast<const std::int64_t*>(tokens), count, position,
                                   reinterpret_cast<float*>(logits), every, threads < 1 ? 1 : threads, exact,
                                   self.limited()};
             return self.step(request, {reinterpret_cast<unsigned char*>(cache), capacity, static_cast<Value>(value)});
           })
      .def("cache_bytes",
           [](const Decoder& self, std::int64_t capacity, int value) {
             return self.cache_bytes(capacity, static_cast<Value>(value));
           })
      .def("limit", &Decoder::limit)
      .def("watch", &Decoder::watch)
      .def("seconds", &Decoder::seconds);
}

}  // namespace gossamer
