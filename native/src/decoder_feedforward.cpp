// The second half of a layer: gate, up and down.
#include "decoder_run.hpp"

namespace gossamer {
namespace {

thread_local Room<std::int32_t> places_room;
thread_local Room<float> values_room;

}  // namespace

void Decoder::Run::feedforward(const Member& self, const Layer& layer, const Norm& next) {
  const std::int64_t width = layer.gate.rows, stride = padded(width);
  if (halved(self, layer.gate) && halved(self, layer.up) && !fires(layer)) activate_halves(self, layer);
  else activate_rows(self, layer);
  if (self.number == 0)
    for (int token = 0; token < self.tokens; ++token) clear(gates_ + token * stride, width);
  meet(self, kMatrices);
  multiply_halves(self, layer.down, gates_, stride, results_, decoder_.hidden_, halves_[0]);
  meet(self, kMatrices);
  add_results(self, layer.down, layer.after_feedforward, next);
}

// The inputs of the last matrix: every member those of the rows that it has computed itself.
void Decoder::Run::activate_rows(const Member& self, const Layer& layer) const {
  const std::int64_t stride = padded(layer.gate.rows);
  const Inputs inputs{inputs_, wide_, self.tokens};
  in_pieces(self, layer.gate, [&](Range rows) {
    product(layer.gate, rows, inputs, {gates_, stride});
    if (fires(layer)) return fire(self, layer, rows, inputs, stride);
    product(layer.up, rows, inputs, {ups_, stride});
    for (int token = 0; token < self.tokens; ++token) {
      const std::int64_t place = token * stride + rows.first;
      kernels_.steps.activate(layer.activation, gates_ + place, ups_ + place, rows.last - rows.first);
    }
  });
}

void Decoder::Run::activate_halves(const Member& self, const Layer& layer) {
  const std::int64_t width = layer.gate.rows;
  multiply_halves(self, layer.gate, inputs_, wide_, gates_, width, halves_[0]);
  multiply_halves(self, layer.up, inputs_, wide_, ups_, width, halves_[1]);
  meet(self, kMatrices);
  const std::int64_t first = begin_of(width, self.number, self.members);
  const std::int64_t count = begin_of(width, self.number + 1, self.members) - first;
  join(self, layer.gate, gates_ + first, halves_[0] + first, count);
  join(self, layer.up, ups_ + first, halves_[1] + first, count);
  kernels_.steps.activate(layer.activation, gates_ + first, ups_ + first, count);
}

// The activations of neurons whose gate is known: of those that stay, `up` is computed.
void Decoder::Run::fire(const Member& self, const Layer& layer, Range rows, const Inputs& inputs,
                        std::int64_t stride) const {
  const auto [first, last] = rows;
  const std::int64_t count = last - first;
  float* gates = gates_ + first;
  for (int token = 0; token < self.tokens; ++token) {
    float* line = gates + token * stride;
    kernels_.steps.activate(layer.activation, line, decoder_.ones_.data(), count);
    for (std::int64_t i = 0; i < count; ++i)
      if ((line[i] < 0 ? -line[i] : line[i]) <= layer.gate_limits[first + i]) line[i] = 0.0f;
  }
  std::int32_t* places = places_room.of(count);
  float* values = values_room.of(count * self.tokens);
  const std::int64_t live = kernels_.channels.select(gates, stride, self.tokens, nullptr, count, places, values);
  for (std::int64_t k = 0; k < live; ++k) places[k] += static_cast<std::int32_t>(first);
  layer.up.multiply_some(kernels_, places, live, inputs, {ups_, stride});
  for (int token = 0; token < self.tokens; ++token)
    for (std::int64_t k = 0; k < live; ++k) {
      float& gate = gates_[token * stride + places[k]];
      // other tokens may want a neuron that is silent here, and its `up` may be infinite
      if (gate != 0.0f) gate *= ups_[token * stride + places[k]];
    }
}

}  // namespace gossamer
