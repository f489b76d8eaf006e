// The first half of a layer: queries, keys and values of some tokens, the cache, and what heads read in it.
#include "decoder_run.hpp"

namespace gossamer {
namespace {

constexpr std::int64_t kNote = 16;   // floats behind each partial result: maximum and sum, and room up to a line
constexpr std::int64_t kBlock = 16;  // positions of a block of keys, see Span

constexpr std::int64_t size_of_partial(const Layer& layer) { return layer.dim + kNote; }

// The positions that a token sees.
Range seen_by(const Layer& layer, std::int64_t position) {
  return {layer.window > 0 ? std::max<std::int64_t>(0, position - layer.window + 1) : 0, position + 1};
}

}  // namespace

// One token has a partial result for each head and span. Of several tokens each member needs two for every head: what
// it has found so far, and what the next span adds.
std::int64_t Decoder::Run::partial_results() const {
  const std::int64_t spans = (request_.position + request_.count + kSpan - 1) / kSpan;
  const std::int64_t of_head = std::max<std::int64_t>(spans, 2 * request_.threads);
  std::int64_t most = 0;
  for (const Layer& layer : decoder_.layers_) most = std::max(most, layer.heads * size_of_partial(layer) * of_head);
  return most;
}

void Decoder::Run::attention(const Member& self, const Layer& layer, const LayerCache& cache) {
  const std::int64_t width = layer.heads * layer.dim, key_width = layer.key_heads * layer.dim;
  multiply_halves(self, layer.query, inputs_, wide_, queries_, width, halves_[0]);
  multiply_halves(self, layer.key, inputs_, wide_, keys_, key_width, halves_[1]);
  multiply_halves(self, layer.value, inputs_, wide_, values_, key_width, halves_[2]);
  meet(self, kMatrices);
  const std::int64_t heads = layer.heads + layer.key_heads;
  each(self, self.tokens * heads, [&](std::int64_t unit) {
    const std::int64_t token = unit / heads, head = unit % heads;
    if (head < layer.heads) turn_query(self, layer, token, head);
    else turn_key(self, layer, token, head - layer.heads, cache);
  });
  meet(self, kAttention);
  if (self.tokens == 1) attend_one(self, layer, cache);
  else attend_many(self, layer, cache);
  meet(self, kAttention);
  multiply_halves(self, layer.output, mixed_, padded(width), results_, decoder_.hidden_, halves_[0]);
  meet(self, kMatrices);
  add_results(self, layer.output, layer.after_attention, layer.before_feedforward);
}

// Norm and rotation of one head of a token's query.
void Decoder::Run::turn_query(const Member& self, const Layer& layer, std::int64_t token, std::int64_t head) {
  float* query = queries_ + (token * layer.heads + head) * layer.dim;
  join(self, layer.query, query, halves_[0] + head * layer.dim, layer.dim);
  if (layer.query_norm) normalise(layer.query_norm, query, query, layer.dim);
  rotate(layer, self.position + token, query, layer.scale);
}

// The same of its key, which goes into the cache with its value.
void Decoder::Run::turn_key(const Member& self, const Layer& layer, std::int64_t token, std::int64_t head,
                            const LayerCache& cache) {
  const std::int64_t place = (token * layer.key_heads + head) * layer.dim, position = self.position + token;
  float *key = keys_ + place, *value = values_ + place;
  join(self, layer.key, key, halves_[1] + head * layer.dim, layer.dim);
  join(self, layer.value, value, halves_[2] + head * layer.dim, layer.dim);
  if (layer.key_norm) normalise(layer.key_norm, key, key, layer.dim);
  rotate(layer, position, key, 1.0f);
  keep(layer, head, position, key, value, cache);
}

void Decoder::Run::rotate(const Layer& layer, std::int64_t position, float* head, float scale) const {
  const std::int64_t angles = position * layer.rotary;
  kernels_.steps.rotate(head, layer.cosines + angles, layer.sines + angles, layer.rotary / 2, layer.dim, scale);
}

void Decoder::Run::keep(const Layer& layer, std::int64_t head, std::int64_t position, const float* key,
                        const float* value, const LayerCache& cache) const {
  const std::int64_t dim = layer.dim, base = head * cache_.capacity * dim;
  const std::int64_t place = base + position / kBlock * kBlock * dim + position % kBlock;
  if (cache_.value == Value::float32) {
    auto* there = reinterpret_cast<float*>(cache.keys) + place;
    for (std::int64_t d = 0; d < dim; ++d) there[d * kBlock] = key[d];
    std::copy_n(value, dim, reinterpret_cast<float*>(cache.values) + base + position * dim);
    return;
  }
  auto* there = reinterpret_cast<std::uint16_t*>(cache.keys) + place;
  std::uint16_t narrow[64];
  for (std::int64_t d = 0; d < dim; d += 64) {
    const std::int64_t count = std::min<std::int64_t>(64, dim - d);
    kernels_.narrow_bfloat16(key + d, narrow, count);
    for (std::int64_t i = 0; i < count; ++i) there[(d + i) * kBlock] = narrow[i];
  }
  kernels_.narrow_bfloat16(value, reinterpret_cast<std::uint16_t*>(cache.values) + base + position * dim, dim);
}

// One token: the spans are divided among the members and put together afterwards, in their order.
void Decoder::Run::attend_one(const Member& self, const Layer& layer, const LayerCache& cache) {
  const Range seen = seen_by(layer, self.position);
  const std::int64_t low = seen.first / kSpan, spans = (seen.last + kSpan - 1) / kSpan - low;
  const std::int64_t group = layer.heads / layer.key_heads, size = size_of_partial(layer);
  each(self, layer.key_heads * spans, [&](std::int64_t unit) {
    const std::int64_t head = unit / spans, span = unit % spans;
    attend(layer, head, low + span, seen, cache, queries_ + head * group * layer.dim,
           partial_ + (head * group * spans + span) * size, spans * size);
  });
  meet(self, kAttention);
  each(self, layer.heads, [&](std::int64_t head) {
    float* running = partial_ + head * spans * size;
    for (std::int64_t span = 1; span < spans; ++span) kernels_.steps.merge(running, running + span * size, layer.dim);
    put(layer, 0, head, running);
  });
}

// Several tokens: each with one head of keys is the work of one member.
void Decoder::Run::attend_many(const Member& self, const Layer& layer, const LayerCache& cache) {
  const std::int64_t group = layer.heads / layer.key_heads, size = size_of_partial(layer);
  float* running = partial_ + 2 * self.number * layer.heads * size;
  float* further = running + layer.heads * size;
  each(self, self.tokens * layer.key_heads, [&](std::int64_t unit) {
    const std::int64_t token = unit / layer.key_heads, head = unit % layer.key_heads;
    const Range seen = seen_by(layer, self.position + token);
    const float* queries = queries_ + (token * layer.heads + head * group) * layer.dim;
    for (std::int64_t span = seen.first / kSpan; span * kSpan < seen.last; ++span) {
      const bool begins = span == seen.first / kSpan;
      attend(layer, head, span, seen, cache, queries, begins ? running : further, size);
      if (begins) continue;
      for (std::int64_t h = 0; h < group; ++h) kernels_.steps.merge(running + h * size, further + h * size, layer.dim);
    }
    for (std::int64_t h = 0; h < group; ++h) put(layer, token, head * group + h, running + h * size);
  });
}

// What all queries that share a head of keys find in one span; their partial results lie `stride` floats apart.
void Decoder::Run::attend(const Layer& layer, std::int64_t head, std::int64_t span, Range seen, const LayerCache& cache,
                          const float* queries, float* partial, std::int64_t stride) const {
  const std::int64_t base = head * cache_.capacity * layer.dim * bytes_of(cache_.value);
  const Span one{cache.keys + base,
                 cache.values + base,
                 cache_.value,
                 layer.dim,
                 std::max(seen.first, span * kSpan),
                 std::min(seen.last, (span + 1) * kSpan),
                 layer.cap};
  kernels_.steps.attend(one, queries, static_cast<int>(layer.heads / layer.key_heads), partial, stride);
}

// One head of what the output matrix takes, from its sums; whoever has the last head clears what lies behind it.
void Decoder::Run::put(const Layer& layer, std::int64_t token, std::int64_t head, const float* found) {
  float* there = mixed_ + token * padded(layer.heads * layer.dim);
  const float factor = 1.0f / found[layer.dim + 1];
  for (std::int64_t d = 0; d < layer.dim; ++d) there[head * layer.dim + d] = found[d] * factor;
  if (head == layer.heads - 1) clear(there, layer.heads * layer.dim);
}

}  // namespace gossamer
