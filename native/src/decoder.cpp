#include "decoder.hpp"

#include <algorithm>
#include <utility>

#include "decoder_run.hpp"
#include "parallel.hpp"

namespace gossamer {

Decoder::Decoder(Matrix embedding, float embedding_scale, Norm last_norm, Matrix head, float logit_cap,
                 std::vector<Layer> layers)
    : embedding_(std::move(embedding)),
      head_(std::move(head)),
      embedding_scale_(embedding_scale),
      logit_cap_(logit_cap),
      last_norm_(last_norm),
      layers_(std::move(layers)),
      hidden_(embedding_.columns) {
  for (const Layer& layer : layers_) {
    widest_ = std::max({widest_, padded(layer.heads * layer.dim), padded(layer.gate.rows)});
    if (layer.gate_limits && static_cast<std::int64_t>(ones_.size()) < layer.gate.rows)
      ones_.assign(static_cast<std::size_t>(layer.gate.rows), 1.0f);
  }
}

std::int64_t Decoder::cache_bytes(std::int64_t capacity, Value value) const {
  std::int64_t bytes = 0;
  for (const Layer& layer : layers_) bytes += 2 * layer.key_heads * layer.dim * capacity * bytes_of(value);
  return bytes;
}

std::vector<double> Decoder::seconds() {
  std::lock_guard<std::mutex> only(busy_);
  std::vector<double> found;
  found.swap(seconds_);
  return found;
}

void Decoder::divide(int parts) {
  if (parts == parts_) return;
  for (Layer& layer : layers_)
    for (Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down})
      matrix->divide(parts);
  head_.divide(parts);
  parts_ = parts;
}

std::int64_t Decoder::step(const Request& request, const Cache& cache) {
  std::lock_guard<std::mutex> only(busy_);
  Run run(*this, request, cache);
  team(request.threads, [&](int member, int members) { run.work(member, members); });
  if (watching_) {
    seconds_.resize(run.seconds().size(), 0.0);
    for (std::size_t kind = 0; kind < seconds_.size(); ++kind) seconds_[kind] += run.seconds()[kind];
  }
  return run.best();
}

}  // namespace gossamer
