#include "decoder.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "cpu.hpp"
#include "integer_inputs.hpp"
#include "parallel.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace {

constexpr int kPromptTile = 32;              // tokens of a prompt that go through the layers together
constexpr std::int64_t kRowsAtOnce = 32768;  // weights that several tokens use while they are in the cache
constexpr std::int64_t kPanel = 16;          // rows that are computed side by side
constexpr std::int64_t kDensePanel = 12;     // the same of dense rows, or half as many
constexpr std::int64_t kHalved = 8;          // lines that the kernel takes together, so that the first half is whole
constexpr int kNote = 16;                    // floats behind each partial result of attention: maximum and sum

std::int64_t padded(std::int64_t count) { return (count + 63) / 64 * 64; }

// Where part `part` of `count` things begins.
std::int64_t share(std::int64_t count, int part, int parts) { return count * part / parts; }

class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins > 300) std::this_thread::yield();  // some ten microseconds: the others may wait for this processor
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

// First row of each member's part: all parts hold equally many stored values, a row counting for some of its own.
std::vector<std::int64_t> cuts(const Matrix& matrix, int parts) {
  std::vector<std::int64_t> found(static_cast<std::size_t>(parts) + 1, 0);
  const std::int64_t* starts = matrix.starts();
  const std::int64_t overhead = matrix.kind == Matrix::Kind::bitmask ? matrix.columns / 16 : 1;
  const std::int64_t band = matrix.band(), bands = (matrix.rows + band - 1) / band;
  std::int64_t next = 0;
  for (int part = 1; part <= parts; ++part) {
    std::int64_t row = share(matrix.rows, part, parts);
    if (starts && part < parts) {
      const std::int64_t all = starts[bands] - starts[0] + bands * overhead;
      while (next < bands && starts[next] - starts[0] + next * overhead < share(all, part, parts)) ++next;
      row = std::min(next * band, matrix.rows);
    }
    const bool panels = matrix.kind == Matrix::Kind::nibbles || matrix.kind == Matrix::Kind::patterns;
    if (panels && part < parts) row = row / kPanel * kPanel;
    if (matrix.kind == Matrix::Kind::channels && part < parts) row = row / kLineBlock * kLineBlock;
    found[static_cast<std::size_t>(part)] = row;
  }
  return found;
}

// Room of a thread, which keeps what it has had.
thread_local std::vector<std::int32_t> places_room;
thread_local std::vector<float> values_room;
thread_local RoundedVectors rounded_room;

template <typename T>
T* room(std::vector<T>& memory, std::int64_t count) {
  if (memory.size() < static_cast<std::size_t>(count) + 16) memory.resize(static_cast<std::size_t>(count) + 16);
  return memory.data();
}

// Every thread looks for the live inputs itself: it takes less time than to wait for another.
LiveChannels live_channels(const Kernels& kernels, const Matrix& matrix, const Inputs& inputs, bool sparse) {
  std::int32_t* places = room(places_room, matrix.columns);
  float* values = room(values_room, matrix.columns * inputs.count);
  const std::int64_t count = kernels.channels.select(inputs.data, inputs.stride, inputs.count,
                                                     sparse ? matrix.limits : nullptr, matrix.columns, places, values);
  return {count, inputs.count, places, values};
}

}  // namespace

const std::int64_t* Matrix::starts() const {
  switch (kind) {
    case Kind::bitmask: return bitmask.starts;
    case Kind::groups: return groups.starts;
    case Kind::blocks: return blocks.starts;
    default: return nullptr;
  }
}

void Matrix::multiply(const Kernels& kernels, std::int64_t first, std::int64_t last, const Inputs& inputs,
                      const Outputs& outputs, bool sparse) const {
  switch (kind) {
    case Kind::none: return;
    case Kind::dense:
      if (rounded) kernels.integers.dense(dense, first, last, rounded_room.fill(kernels, inputs, columns), outputs);
      else kernels.dense(dense, first, last, inputs, outputs);
      break;
    case Kind::bitmask:
      if (rounded) kernels.integers.bitmask(bitmask, first, last, rounded_room.fill(kernels, inputs, columns), outputs);
      else kernels.bitmask(bitmask, first, last, inputs, outputs);
      break;
    case Kind::groups: kernels.groups(groups, first, last, inputs, outputs); break;
    case Kind::nibbles: kernels.steps.nibbles(nibbles, first, last, inputs, outputs); break;
    case Kind::blocks: kernels.blocks.few(blocks, first, last, inputs, outputs); break;
    case Kind::patterns: kernels.patterns.multiply(patterns, first, last, inputs, outputs); break;
    case Kind::channels: {
      const LiveChannels live = live_channels(kernels, *this, inputs, sparse);
      kernels.channels.spread(lines, live, first, last, outputs.data, outputs.stride, false);
      break;
    }
    case Kind::nibble_rows: {
      std::int32_t* places = room(places_room, last - first);
      for (std::int64_t row = first; row < last; ++row) places[row - first] = static_cast<std::int32_t>(row);
      return multiply_some(kernels, places, last - first, inputs, outputs);
    }
    default: return;
  }
  if (!bias) return;
  for (int b = 0; b < inputs.count; ++b) kernels.steps.add(outputs.data + b * outputs.stride + first, bias + first, last - first);
}

void Matrix::multiply_half(const Kernels& kernels, int half, std::int64_t first, std::int64_t last,
                           const Inputs& inputs, const Outputs& outputs, bool sparse) const {
  const LiveChannels live = live_channels(kernels, *this, inputs, sparse);
  const std::int64_t middle = std::min((live.count / 2 + kHalved - 1) / kHalved * kHalved, live.count);
  const std::int64_t begin = half ? middle : 0, end = half ? live.count : middle;
  const LiveChannels some{end - begin, live.rows, live.places + begin, live.inputs + begin * live.rows};
  kernels.channels.spread(lines, some, first, last, outputs.data, outputs.stride, false);
  if (half || !bias) return;
  for (int b = 0; b < inputs.count; ++b)
    kernels.steps.add(outputs.data + b * outputs.stride + first, bias + first, last - first);
}

void Matrix::multiply_some(const Kernels& kernels, const std::int32_t* places, std::int64_t count, const Inputs& inputs,
                           const Outputs& outputs) const {
  const ChannelLines all = kind == Kind::dense
                               ? ChannelLines{rows, columns, dense.values, dense.scales, dense.group, dense.value}
                               : lines;
  kernels.channels.gather(all, places, count, inputs.data, inputs.stride, inputs.count, outputs.data, outputs.stride);
  if (!bias) return;
  for (int b = 0; b < inputs.count; ++b)
    for (std::int64_t k = 0; k < count; ++k) outputs.data[b * outputs.stride + places[k]] += bias[places[k]];
}

void Matrix::multiply_exactly(const Kernels& kernels, std::int64_t first, std::int64_t last, const Inputs& inputs,
                              const Outputs& outputs) const {
  std::vector<float> weights(static_cast<std::size_t>(padded(columns)), 0.0f);
  for (std::int64_t row = first; row < last; ++row) {
    expand_row(kernels, row, weights.data());
    for (int b = 0; b < inputs.count; ++b) {
      const float* x = inputs.data + b * inputs.stride;
      double total = bias ? bias[row] : 0.0;
      for (std::int64_t column = 0; column < columns; ++column) total += static_cast<double>(weights[column]) * x[column];
      outputs.data[b * outputs.stride + row] = static_cast<float>(total);
    }
  }
}

void Matrix::expand_row(const Kernels& kernels, std::int64_t row, float* target) const {
  switch (kind) {
    case Kind::none:
    case Kind::channels:
    case Kind::nibble_rows:
    case Kind::integer_dense:
    case Kind::integer_bitmask: return;  // no embedding is stored so
    case Kind::dense: return kernels.steps.expand_dense(dense, row, row + 1, target, columns);
    case Kind::bitmask: return kernels.expand_bitmask(bitmask, row, row + 1, target, columns);
    case Kind::groups: return kernels.expand_groups(groups, row, row + 1, target, columns);
    case Kind::nibbles: return kernels.steps.expand_nibbles(nibbles, row, row + 1, target, columns);
    case Kind::blocks: return kernels.blocks.expand(blocks, row, row + 1, target, columns);
    case Kind::patterns: return kernels.patterns.expand(patterns, row, row + 1, target, columns);
  }
}

Decoder::Decoder(Matrix embedding, float embedding_scale, Norm last_norm, Matrix head, float logit_cap,
                 std::vector<Layer> layers)
    : embedding_(embedding),
      head_(head),
      embedding_scale_(embedding_scale),
      logit_cap_(logit_cap),
      last_norm_(last_norm),
      layers_(std::move(layers)),
      hidden_(embedding.columns),
      widest_(0) {
  for (const Layer& layer : layers_) {
    widest_ = std::max({widest_, padded(layer.heads * layer.dim), padded(layer.gate.rows)});
    if (layer.gate_limits && static_cast<std::int64_t>(ones_.size()) < layer.gate.rows)
      ones_.assign(static_cast<std::size_t>(layer.gate.rows), 1.0f);
  }
}

std::int64_t Decoder::cache_bytes(std::int64_t capacity, Value value) const {
  std::int64_t bytes = 0;
  for (const Layer& layer : layers_)
    bytes += 2 * layer.key_heads * layer.dim * capacity * (value == Value::float32 ? 4 : 2);
  return bytes;
}

std::vector<double> Decoder::seconds() {
  std::lock_guard<std::mutex> only(busy_);
  std::vector<double> found;
  found.swap(seconds_);
  return found;
}

// What the members of a team share while they go through the layers.
class Decoder::Run {
 public:
  Run(Decoder& decoder, const Request& request, const Cache& cache)
      : decoder_(decoder),
        kernels_(kernels()),
        request_(request),
        cache_(cache),
        item_(cache.value == Value::float32 ? 4 : 2),
        wide_(padded(decoder.hidden_)),
        best_(static_cast<std::size_t>(request.threads), {-1, 0.0f}) {
    const std::int64_t tile = std::min(request.count, kPromptTile), widest = decoder.widest_;
    const std::int64_t spans = (request.position + request.count + kSpan - 1) / kSpan;
    std::int64_t partial = 0;
    for (const Layer& layer : decoder.layers_)
      partial = std::max(partial, layer.heads * (layer.dim + kNote) * std::max<std::int64_t>(spans, 2 * request.threads));
    const std::int64_t half = std::max(widest, wide_);
    std::size_t needed = 0;
    const auto reserve = [&](std::int64_t count) {
      const std::size_t begin = needed;
      needed += static_cast<std::size_t>(padded(count)) + 64;
      return begin;
    };
    const std::size_t places[] = {reserve(tile * decoder.hidden_), reserve(tile * wide_),   reserve(tile * decoder.hidden_),
                                  reserve(tile * widest),          reserve(tile * widest),  reserve(tile * widest),
                                  reserve(tile * widest),          reserve(partial),        reserve(half),
                                  reserve(half),                   reserve(half)};
    if (decoder.memory_.size() < needed + 16) decoder.memory_.assign(needed + 16, 0.0f);
    float** buffers[] = {&stream_, &inputs_, &results_, &first_, &second_, &third_, &fourth_, &partial_,
                         &halves_[0], &halves_[1], &halves_[2]};
    auto address = reinterpret_cast<std::uintptr_t>(decoder.memory_.data());
    float* base = decoder.memory_.data() + (64 - address % 64) % 64 / sizeof(float);
    for (std::size_t i = 0; i < std::size(buffers); ++i) *buffers[i] = base + places[i];
  }

  void work(int member, int members) {
    const auto begin = std::chrono::steady_clock::now();
    if (member == 0) before_ = begin;
    for (int first = 0; first < request_.count; first += kPromptTile) {
      const Member self{member, members, std::min(kPromptTile, request_.count - first), first, request_.position + first};
      embed(self);
      unsigned char* memory = cache_.memory;
      for (std::size_t i = 0; i < decoder_.layers_.size(); ++i) {
        const Layer& layer = decoder_.layers_[i];
        const std::int64_t bytes = layer.key_heads * layer.dim * cache_.capacity * item_;
        attention(self, layer, i, memory, memory + bytes);
        feedforward(self, layer, i);
        memory += 2 * bytes;
      }
      logits(self);
    }
  }

  std::int64_t best() const {
    std::pair<std::int64_t, float> most{-1, 0.0f};
    for (const auto& one : best_)  // in the order of rows, so that the first of equal ones wins
      if (one.first >= 0 && (most.first < 0 || one.second > most.second)) most = one;
    return std::max<std::int64_t>(most.first, 0);
  }

  const double* seconds() const { return seconds_; }

 private:
  enum Kind { kRest, kMatrices, kAttention, kHead };
  enum Which { kQuery, kKey, kValue, kOutput, kGate, kDown, kMatricesOfLayer };

  struct Member {
    int number, members;
    int tokens;             // of this tile
    int first;              // of these, in the request
    std::int64_t position;  // of the first of these
  };

  void meet(const Member& self, Kind kind) {
    barrier_.wait(self.members);
    if (!decoder_.watching_ || self.number != 0) return;
    const auto now = std::chrono::steady_clock::now();
    seconds_[kind] += std::chrono::duration<double>(now - before_).count();
    before_ = now;
  }

  std::pair<std::int64_t, std::int64_t> rows(const Member& self, const Matrix& matrix, std::size_t place) const {
    if (self.members != request_.threads) {
      const std::int64_t block = matrix.kind == Matrix::Kind::channels ? kLineBlock : 1;
      const std::int64_t blocks = (matrix.rows + block - 1) / block;
      return {share(blocks, self.number, self.members) * block,
              std::min(share(blocks, self.number + 1, self.members) * block, matrix.rows)};
    }
    const auto number = static_cast<std::size_t>(self.number);
    const std::vector<std::int64_t>& cuts = decoder_.cuts_[place];
    return {cuts[number], cuts[number + 1]};
  }

  // use(first row, last row), in pieces whose weights stay in the cache while all tokens use them
  template <typename Use>
  void in_pieces(const Member& self, const Matrix& matrix, std::size_t place, Use&& use) const {
    const auto [first, last] = rows(self, matrix, place);
    const std::int64_t weights = matrix.kind == Matrix::Kind::nibbles || matrix.rounded ? 4 * kRowsAtOnce : kRowsAtOnce;
    const std::int64_t panel = matrix.kind == Matrix::Kind::dense ? kDensePanel : kPanel;
    const std::int64_t fitting = weights / std::max<std::int64_t>(1, matrix.columns) / panel * panel;
    const bool whole = self.tokens == 1 || matrix.kind == Matrix::Kind::channels;
    const std::int64_t step = whole ? last - first : std::max(panel, fitting);
    for (std::int64_t row = first; row < last; row += step) use(row, std::min(row + step, last));
  }

  void multiply(const Member& self, const Matrix& matrix, std::size_t place, const float* inputs, std::int64_t stride,
                float* outputs, std::int64_t output_stride) const {
    in_pieces(self, matrix, place, [&](std::int64_t first, std::int64_t last) {
      product(matrix, first, last, {inputs, stride, self.tokens}, {outputs, output_stride});
    });
  }

  void product(const Matrix& matrix, std::int64_t first, std::int64_t last, const Inputs& inputs,
               const Outputs& outputs) const {
    if (request_.exact && matrix.rounds()) matrix.multiply_exactly(kernels_, first, last, inputs, outputs);
    else matrix.multiply(kernels_, first, last, inputs, outputs, request_.sparse);
  }

  // Whether the live inputs of a matrix are divided into halves, and not only its rows: then a thread reads whole lines,
  // or longer pieces of them, which memory gives sooner. How they are divided does not depend on the number of threads.
  static bool halved(const Member& self, const Matrix& matrix) {
    return self.tokens == 1 && matrix.kind == Matrix::Kind::channels;
  }

  // What one half puts out goes to `outputs`, and of a matrix that is `halved` the other to `others`.
  void multiply_halves(const Member& self, const Matrix& matrix, std::size_t place, const float* inputs,
                       std::int64_t stride, float* outputs, std::int64_t output_stride, float* others) const {
    if (!halved(self, matrix)) return multiply(self, matrix, place, inputs, stride, outputs, output_stride);
    const std::int64_t blocks = (matrix.rows + kLineBlock - 1) / kLineBlock;
    const std::int64_t begin = share(2 * blocks, self.number, self.members);
    const std::int64_t end = share(2 * blocks, self.number + 1, self.members);
    for (int half = 0; half < 2; ++half) {
      const std::int64_t first = std::max(begin - half * blocks, std::int64_t{0}) * kLineBlock;
      const std::int64_t last = std::min(std::min(end - half * blocks, blocks) * kLineBlock, matrix.rows);
      if (first < last)
        matrix.multiply_half(kernels_, half, first, last, {inputs, stride, 1}, {half ? others : outputs, output_stride},
                             request_.sparse);
    }
  }

  // Adds the other half of what a matrix has put out, once all have met.
  void join(const Member& self, const Matrix& matrix, float* outputs, const float* others, std::int64_t count) const {
    if (halved(self, matrix)) kernels_.steps.add(outputs, others, count);
  }

  template <typename Use>
  static void each(const Member& self, std::int64_t count, Use&& use) {
    for (std::int64_t i = self.number; i < count; i += self.members) use(i);
  }

  void normalise(const Norm& norm, const float* source, float* target, std::int64_t count) const {
    kernels_.steps.normalise(source, norm.weight, norm.epsilon, target, count);
  }

  // Zeros behind the inputs of a matrix, up to where its kernel may read.
  static void clear(float* line, std::int64_t count) { std::fill(line + count, line + padded(count), 0.0f); }

  void embed(const Member& self) {
    const std::int64_t hidden = decoder_.hidden_;
    each(self, self.tokens, [&](std::int64_t token) {
      float* line = stream_ + token * hidden;
      decoder_.embedding_.expand_row(kernels_, request_.tokens[self.first + token], line);
      for (std::int64_t i = 0; i < hidden; ++i) line[i] *= decoder_.embedding_scale_;
      prepare(decoder_.layers_[0].before_attention, token);
    });
    meet(self, kRest);
  }

  // The inputs of the next matrices, from the residual stream.
  void prepare(const Norm& norm, std::int64_t token) {
    const std::int64_t hidden = decoder_.hidden_;
    float* line = inputs_ + token * wide_;
    if (norm) normalise(norm, stream_ + token * hidden, line, hidden);
    else std::copy_n(stream_ + token * hidden, hidden, line);
    clear(line, hidden);
  }

  // Add what the last matrix has put out to the residual stream, and prepare the inputs of the next one.
  void add_results(const Member& self, const Matrix& last, const Norm& after, const Norm& next) {
    const std::int64_t hidden = decoder_.hidden_;
    each(self, self.tokens, [&](std::int64_t token) {
      float* line = results_ + token * hidden;
      join(self, last, line, halves_[0], hidden);
      if (after) normalise(after, line, line, hidden);
      kernels_.steps.add(stream_ + token * hidden, line, hidden);
      prepare(next, token);
    });
    meet(self, kRest);
  }

  void attention(const Member& self, const Layer& layer, std::size_t index, unsigned char* keys, unsigned char* values) {
    const std::size_t place = index * kMatricesOfLayer;
    const std::int64_t width = layer.heads * layer.dim, key_width = layer.key_heads * layer.dim;
    multiply_halves(self, layer.query, place + kQuery, inputs_, wide_, first_, width, halves_[0]);
    multiply_halves(self, layer.key, place + kKey, inputs_, wide_, second_, key_width, halves_[1]);
    multiply_halves(self, layer.value, place + kValue, inputs_, wide_, third_, key_width, halves_[2]);
    meet(self, kMatrices);
    const std::int64_t heads = layer.heads + layer.key_heads;
    each(self, self.tokens * heads, [&](std::int64_t unit) { turn(self, layer, unit / heads, unit % heads, keys, values); });
    meet(self, kAttention);
    if (self.tokens == 1) attend_one(self, layer, keys, values);
    else attend_many(self, layer, keys, values);
    meet(self, kAttention);
    multiply_halves(self, layer.output, place + kOutput, fourth_, padded(width), results_, decoder_.hidden_, halves_[0]);
    meet(self, kMatrices);
    add_results(self, layer.output, layer.after_attention, layer.before_feedforward);
  }

  // One head of one token: norm and rotation of a query, or of a key, which goes into the cache with its value.
  void turn(const Member& self, const Layer& layer, std::int64_t token, std::int64_t head, unsigned char* keys,
            unsigned char* values) {
    const std::int64_t dim = layer.dim, position = self.position + token, half = layer.rotary / 2;
    const float* cosines = layer.cosines + position * layer.rotary;
    const float* sines = layer.sines + position * layer.rotary;
    if (head < layer.heads) {
      float* line = first_ + (token * layer.heads + head) * dim;
      join(self, layer.query, line, halves_[0] + head * dim, dim);
      if (layer.query_norm) normalise(layer.query_norm, line, line, dim);
      kernels_.steps.rotate(line, cosines, sines, half, dim, layer.scale);
      return;
    }
    head -= layer.heads;
    float* key = second_ + (token * layer.key_heads + head) * dim;
    float* value = third_ + (token * layer.key_heads + head) * dim;
    join(self, layer.key, key, halves_[1] + head * dim, dim);
    join(self, layer.value, value, halves_[2] + head * dim, dim);
    if (layer.key_norm) normalise(layer.key_norm, key, key, dim);
    kernels_.steps.rotate(key, cosines, sines, half, dim, 1.0f);
    const std::int64_t base = head * cache_.capacity * dim, block = base + position / 16 * 16 * dim + position % 16;
    if (cache_.value == Value::float32) {
      auto* there = reinterpret_cast<float*>(keys) + block;
      for (std::int64_t d = 0; d < dim; ++d) there[d * 16] = key[d];
      std::copy_n(value, dim, reinterpret_cast<float*>(values) + base + position * dim);
    } else {
      auto* there = reinterpret_cast<std::uint16_t*>(keys) + block;
      std::uint16_t narrow[64];
      for (std::int64_t d = 0; d < dim; d += 64) {
        const std::int64_t count = std::min<std::int64_t>(64, dim - d);
        kernels_.narrow_bfloat16(key + d, narrow, count);
        for (std::int64_t i = 0; i < count; ++i) there[(d + i) * 16] = narrow[i];
      }
      kernels_.narrow_bfloat16(value, reinterpret_cast<std::uint16_t*>(values) + base + position * dim, dim);
    }
  }

  // The positions that a token sees, in spans: first … last.
  std::pair<std::int64_t, std::int64_t> seen(const Layer& layer, std::int64_t position) const {
    return {layer.window > 0 ? std::max<std::int64_t>(0, position - layer.window + 1) : 0, position + 1};
  }

  void attend(const Layer& layer, std::int64_t head, std::int64_t span, std::int64_t first, std::int64_t last,
              const unsigned char* keys, const unsigned char* values, const float* queries, float* partial,
              std::int64_t stride) const {
    const std::int64_t base = head * cache_.capacity * layer.dim * item_;
    const Span one{keys + base,
                   values + base,
                   cache_.value,
                   layer.dim,
                   std::max(first, span * kSpan),
                   std::min(last, (span + 1) * kSpan),
                   layer.cap};
    kernels_.steps.attend(one, queries, static_cast<int>(layer.heads / layer.key_heads), partial, stride);
  }

  void put(const Layer& layer, std::int64_t token, std::int64_t head, const float* found) {
    float* there = fourth_ + token * padded(layer.heads * layer.dim);
    const float factor = 1.0f / found[layer.dim + 1];
    for (std::int64_t d = 0; d < layer.dim; ++d) there[head * layer.dim + d] = found[d] * factor;
    if (head == layer.heads - 1) clear(there, layer.heads * layer.dim);
  }

  // One token: the spans are divided among the members and put together afterwards, in their order.
  void attend_one(const Member& self, const Layer& layer, const unsigned char* keys, const unsigned char* values) {
    const auto [first, last] = seen(layer, self.position);
    const std::int64_t low = first / kSpan, spans = (last + kSpan - 1) / kSpan - low, size = layer.dim + kNote;
    const std::int64_t group = layer.heads / layer.key_heads, from = first, to = last;
    each(self, layer.key_heads * spans, [&](std::int64_t unit) {
      const std::int64_t head = unit / spans, span = unit % spans;
      attend(layer, head, low + span, from, to, keys, values, first_ + head * group * layer.dim,
             partial_ + (head * group * spans + span) * size, spans * size);
    });
    meet(self, kAttention);
    each(self, layer.heads, [&](std::int64_t head) {
      float* running = partial_ + head * spans * size;
      for (std::int64_t span = 1; span < spans; ++span) kernels_.steps.merge(running, running + span * size, layer.dim);
      put(layer, 0, head, running);
    });
  }

  void attend_many(const Member& self, const Layer& layer, const unsigned char* keys, const unsigned char* values) {
    const std::int64_t size = layer.dim + kNote, group = layer.heads / layer.key_heads;
    float* running = partial_ + 2 * self.number * layer.heads * size;
    float* further = running + layer.heads * size;
    each(self, self.tokens * layer.key_heads, [&](std::int64_t unit) {
      const std::int64_t token = unit / layer.key_heads, head = unit % layer.key_heads;
      const auto [first, last] = seen(layer, self.position + token);
      const float* queries = first_ + (token * layer.heads + head * group) * layer.dim;
      for (std::int64_t span = first / kSpan; span * kSpan < last; ++span) {
        const bool begins = span == first / kSpan;
        attend(layer, head, span, first, last, keys, values, queries, begins ? running : further, size);
        if (begins) continue;
        for (std::int64_t h = 0; h < group; ++h) kernels_.steps.merge(running + h * size, further + h * size, layer.dim);
      }
      for (std::int64_t h = 0; h < group; ++h) put(layer, token, head * group + h, running + h * size);
    });
  }

  void feedforward(const Member& self, const Layer& layer, std::size_t index) {
    const std::size_t place = index * kMatricesOfLayer;
    const std::int64_t width = layer.gate.rows, stride = padded(width);
    if (halved(self, layer.gate) && halved(self, layer.up) && !(request_.sparse && layer.gate_limits))
      activate_halves(self, layer, place);
    else
      activate_rows(self, layer, place);
    if (self.number == 0)
      for (int token = 0; token < self.tokens; ++token) clear(first_ + token * stride, width);
    meet(self, kMatrices);
    multiply_halves(self, layer.down, place + kDown, first_, stride, results_, decoder_.hidden_, halves_[0]);
    meet(self, kMatrices);
    const bool last = index + 1 == decoder_.layers_.size();
    add_results(self, layer.down, layer.after_feedforward, last ? decoder_.last_norm_ : decoder_.layers_[index + 1].before_attention);
  }

  // The inputs of the last matrix: every member those of the rows that it has computed itself.
  void activate_rows(const Member& self, const Layer& layer, std::size_t place) const {
    const std::int64_t stride = padded(layer.gate.rows);
    const Inputs inputs{inputs_, wide_, self.tokens};
    in_pieces(self, layer.gate, place + kGate, [&](std::int64_t first, std::int64_t last) {
      product(layer.gate, first, last, inputs, {first_, stride});
      if (request_.sparse && layer.gate_limits) return fire(self, layer, first, last, inputs, stride);
      product(layer.up, first, last, inputs, {second_, stride});
      for (int token = 0; token < self.tokens; ++token)
        kernels_.steps.activate(layer.activation, first_ + token * stride + first, second_ + token * stride + first,
                                last - first);
    });
  }

  void activate_halves(const Member& self, const Layer& layer, std::size_t place) {
    const std::int64_t width = layer.gate.rows;
    multiply_halves(self, layer.gate, place + kGate, inputs_, wide_, first_, width, halves_[0]);
    multiply_halves(self, layer.up, place + kGate, inputs_, wide_, second_, width, halves_[1]);
    meet(self, kMatrices);
    const std::int64_t first = share(width, self.number, self.members), last = share(width, self.number + 1, self.members);
    join(self, layer.gate, first_ + first, halves_[0] + first, last - first);
    join(self, layer.up, second_ + first, halves_[1] + first, last - first);
    kernels_.steps.activate(layer.activation, first_ + first, second_ + first, last - first);
  }

  // The activations of neurons whose gate is known: of those that stay, `up` is computed.
  void fire(const Member& self, const Layer& layer, std::int64_t first, std::int64_t last, const Inputs& inputs,
            std::int64_t stride) const {
    float* hidden = first_ + first;
    for (int token = 0; token < self.tokens; ++token) {
      float* line = hidden + token * stride;
      kernels_.steps.activate(layer.activation, line, decoder_.ones_.data(), last - first);
      for (std::int64_t i = 0; i < last - first; ++i)
        if ((line[i] < 0 ? -line[i] : line[i]) <= layer.gate_limits[first + i]) line[i] = 0.0f;
    }
    std::int32_t* places = room(places_room, last - first);
    float* values = room(values_room, (last - first) * self.tokens);
    const std::int64_t live = kernels_.channels.select(hidden, stride, self.tokens, nullptr, last - first, places, values);
    for (std::int64_t k = 0; k < live; ++k) places[k] += static_cast<std::int32_t>(first);
    layer.up.multiply_some(kernels_, places, live, inputs, {second_, stride});
    for (int token = 0; token < self.tokens; ++token)
      for (std::int64_t k = 0; k < live; ++k) {
        float& one = first_[token * stride + places[k]];
        if (one != 0.0f) one *= second_[token * stride + places[k]];
      }
  }

  void logits(const Member& self) {
    const bool ends = self.first + self.tokens == request_.count;
    if (!request_.every && !ends) return;
    const Matrix& head = decoder_.head_;
    Member taken = self;
    const float* inputs = inputs_;
    float* outputs = request_.logits;
    if (request_.every) {
      outputs += self.first * head.rows;
    } else {
      inputs += (self.tokens - 1) * wide_;
      taken.tokens = 1;
    }
    const std::size_t place = decoder_.layers_.size() * kMatricesOfLayer;
    multiply(taken, head, place, inputs, wide_, outputs, head.rows);
    const auto [first, last] = rows(self, head, place);
    if (decoder_.logit_cap_ != 0.0f)
      for (int token = 0; token < taken.tokens; ++token)
        kernels_.steps.cap(outputs + token * head.rows + first, decoder_.logit_cap_, last - first);
    if (ends && first < last) {
      const float* line = outputs + (taken.tokens - 1) * head.rows;
      const std::int64_t found = first + kernels_.steps.largest(line + first, last - first);
      best_[static_cast<std::size_t>(self.number)] = {found, line[found]};
    } else {
      best_[static_cast<std::size_t>(self.number)] = {-1, 0.0f};
    }
    meet(self, kHead);
  }

  Decoder& decoder_;
  const Kernels& kernels_;
  const Request& request_;
  const Cache& cache_;
  const std::int64_t item_;
  const std::int64_t wide_;  // from one input vector to the next
  std::vector<std::pair<std::int64_t, float>> best_;
  float *stream_, *inputs_, *results_, *first_, *second_, *third_, *fourth_, *partial_, *halves_[3];
  Barrier barrier_;
  std::chrono::steady_clock::time_point before_;
  double seconds_[4] = {0, 0, 0, 0};
};

void Decoder::divide(int parts) {
  if (parts == parts_) return;
  cuts_.clear();
  for (const Layer& layer : layers_)
    for (const Matrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.down})
      cuts_.push_back(cuts(*matrix, parts));
  cuts_.push_back(cuts(head_, parts));
  parts_ = parts;
}

std::int64_t Decoder::step(const Request& request, const Cache& cache) {
  std::lock_guard<std::mutex> only(busy_);
  divide(request.threads);
  Run run(*this, request, cache);
  team(request.threads, [&](int member, int members) { run.work(member, members); });
  if (watching_) {
    seconds_.resize(4, 0.0);
    for (int i = 0; i < 4; ++i) seconds_[static_cast<std::size_t>(i)] += run.seconds()[i];
  }
  return run.best();
}

}  // namespace gossamer
