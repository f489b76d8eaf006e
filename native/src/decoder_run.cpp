#include "decoder_run.hpp"

#include "cpu.hpp"

namespace gossamer {
namespace {

constexpr int kPromptTile = 32;          // tokens of a prompt that go through the layers together
constexpr std::int64_t kBehind = 64;     // floats behind each buffer that kernels may read
constexpr std::int64_t kAlignment = 64;  // bytes: vectors that do not cross lines of the cache

}  // namespace

Decoder::Run::Run(Decoder& decoder, const Request& request, const Cache& cache)
    : decoder_(decoder),
      kernels_(kernels()),
      request_(request),
      cache_(cache),
      wide_(padded(decoder.hidden_)),
      best_(static_cast<std::size_t>(request.threads), {-1, 0.0f}) {
  const std::int64_t tile = std::min(request.count, kPromptTile), widest = decoder.widest_;
  const std::int64_t half = std::max(widest, wide_);
  const std::pair<float**, std::int64_t> buffers[] = {
      {&stream_, tile * decoder.hidden_},
      {&inputs_, tile * wide_},
      {&results_, tile * decoder.hidden_},
      {&queries_, tile * widest},
      {&keys_, tile * widest},
      {&values_, tile * widest},
      {&mixed_, tile * widest},
      {&partial_, partial_results()},
      {&halves_[0], half},
      {&halves_[1], half},
      {&halves_[2], half},
  };
  std::size_t needed = kAlignment / sizeof(float);
  for (const auto& [buffer, count] : buffers) needed += static_cast<std::size_t>(padded(count) + kBehind);
  if (decoder.memory_.size() < needed) decoder.memory_.assign(needed, 0.0f);
  const auto address = reinterpret_cast<std::uintptr_t>(decoder.memory_.data());
  float* next = decoder.memory_.data() + (kAlignment - address % kAlignment) % kAlignment / sizeof(float);
  for (const auto& [buffer, count] : buffers) {
    *buffer = next;
    next += padded(count) + kBehind;
  }
  gates_ = queries_;
  ups_ = keys_;
}

void Decoder::Run::work(int member, int members) {
  if (member == 0) {
    before_ = std::chrono::steady_clock::now();
    decoder_.divide(members);  // which may be fewer than were asked for
  }
  barrier_.wait(members);
  for (int first = 0; first < request_.count; first += kPromptTile) {
    const Member self{member, members, std::min(kPromptTile, request_.count - first), first, request_.position + first};
    embed(self);
    unsigned char* memory = cache_.memory;
    for (std::size_t i = 0; i < decoder_.layers_.size(); ++i) {
      const Layer& layer = decoder_.layers_[i];
      const bool last = i + 1 == decoder_.layers_.size();
      const std::int64_t bytes = layer.key_heads * layer.dim * cache_.capacity * bytes_of(cache_.value);
      attention(self, layer, {memory, memory + bytes});
      feedforward(self, layer, last ? decoder_.last_norm_ : decoder_.layers_[i + 1].before_attention);
      memory += 2 * bytes;
    }
    logits(self);
  }
}

std::int64_t Decoder::Run::best() const {
  std::pair<std::int64_t, float> most{-1, 0.0f};
  for (const auto& one : best_)  // in the order of rows, so that the first of equal ones wins
    if (one.first >= 0 && (most.first < 0 || one.second > most.second)) most = one;
  return std::max<std::int64_t>(most.first, 0);
}

void Decoder::Run::embed(const Member& self) {
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
void Decoder::Run::prepare(const Norm& norm, std::int64_t token) {
  const std::int64_t hidden = decoder_.hidden_;
  float* line = inputs_ + token * wide_;
  if (norm) normalise(norm, stream_ + token * hidden, line, hidden);
  else std::copy_n(stream_ + token * hidden, hidden, line);
  clear(line, hidden);
}

// Add what the last matrix has put out to the residual stream, and prepare the inputs of the next one.
void Decoder::Run::add_results(const Member& self, const Matrix& last, const Norm& after, const Norm& next) {
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

void Decoder::Run::logits(const Member& self) {
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
  multiply(taken, head, inputs, wide_, outputs, head.rows);
  const auto [first, last] = head.part(self.number);
  if (decoder_.logit_cap_ != 0.0f)
    for (int token = 0; token < taken.tokens; ++token)
      kernels_.steps.cap(outputs + token * head.rows + first, decoder_.logit_cap_, last - first);
  if (ends && first < last) {
    const float* line = outputs + (taken.tokens - 1) * head.rows;
    const std::int64_t found = first + kernels_.steps.largest(line + first, last - first);
    best_[static_cast<std::size_t>(self.number)] = {found, line[found]};
  }
  meet(self, kHead);
}

void Decoder::Run::multiply(const Member& self, const Matrix& matrix, const float* inputs, std::int64_t stride,
                            float* outputs, std::int64_t output_stride) const {
  in_pieces(self, matrix,
            [&](Range rows) { product(matrix, rows, {inputs, stride, self.tokens}, {outputs, output_stride}); });
}

// What one half puts out goes to `outputs`, and of a matrix that is `halved` the other to `others`.
void Decoder::Run::multiply_halves(const Member& self, const Matrix& matrix, const float* inputs, std::int64_t stride,
                                   float* outputs, std::int64_t output_stride, float* others) const {
  if (!halved(self, matrix)) return multiply(self, matrix, inputs, stride, outputs, output_stride);
  const std::int64_t blocks = (matrix.rows + kLineBlock - 1) / kLineBlock;
  const std::int64_t begin = begin_of(2 * blocks, self.number, self.members);
  const std::int64_t end = begin_of(2 * blocks, self.number + 1, self.members);
  for (int half = 0; half < 2; ++half) {
    const std::int64_t first = std::max(begin - half * blocks, std::int64_t{0}) * kLineBlock;
    const std::int64_t last = std::min(std::min(end - half * blocks, blocks) * kLineBlock, matrix.rows);
    if (first < last)
      matrix.multiply_half(kernels_, half, {first, last}, {inputs, stride, 1},
                           {half ? others : outputs, output_stride}, request_.sparse);
  }
}

}  // namespace gossamer
