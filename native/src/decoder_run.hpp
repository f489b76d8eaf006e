// One step of a decoder: what the members of a team share, and what each of them does.
//
// decoder_run.cpp goes through the layers, decoder_attention.cpp and decoder_feedforward.cpp are the two halves of a
// layer. Whoever needs what another member has written meets it at a barrier before.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "decoder.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {

constexpr std::int64_t bytes_of(Value value) { return value == Value::float32 ? 4 : 2; }  // of a cache

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

class Decoder::Run {
 public:
  // Kinds of work whose time is taken; gossamer.runtime.program names them in this order.
  enum Work { kRest, kMatrices, kAttention, kHead, kKinds };

  Run(Decoder& decoder, const Request& request, const Cache& cache);

  void work(int member, int members);

  // The most likely next token.
  std::int64_t best() const;
  const std::array<double, kKinds>& seconds() const { return seconds_; }

 private:
  struct Member {
    int number, members;
    int tokens;             // of this tile
    int first;              // of these, in the request
    std::int64_t position;  // of the first of these
  };

  // The part of the cache that belongs to one layer.
  struct LayerCache {
    unsigned char* keys;
    unsigned char* values;
  };

  void meet(const Member& self, Work done) {
    barrier_.wait(self.members);
    if (!decoder_.watching_ || self.number != 0) return;
    const auto now = std::chrono::steady_clock::now();
    seconds_[done] += std::chrono::duration<double>(now - before_).count();
    before_ = now;
  }

  // In decoder_run.cpp:
  void embed(const Member& self);
  void prepare(const Norm& norm, std::int64_t token);
  void add_results(const Member& self, const Matrix& last, const Norm& after, const Norm& next);
  void logits(const Member& self);
  void multiply(const Member& self, const Matrix& matrix, const float* inputs, std::int64_t stride, float* outputs,
                std::int64_t output_stride) const;
  void multiply_halves(const Member& self, const Matrix& matrix, const float* inputs, std::int64_t stride,
                       float* outputs, std::int64_t output_stride, float* others) const;

  // In decoder_attention.cpp:
  std::int64_t partial_results() const;
  void attention(const Member& self, const Layer& layer, const LayerCache& cache);
  void turn_query(const Member& self, const Layer& layer, std::int64_t token, std::int64_t head);
  void turn_key(const Member& self, const Layer& layer, std::int64_t token, std::int64_t head, const LayerCache& cache);
  void rotate(const Layer& layer, std::int64_t position, float* head, float scale) const;
  void keep(const Layer& layer, std::int64_t head, std::int64_t position, const float* key, const float* value,
            const LayerCache& cache) const;
  void attend_one(const Member& self, const Layer& layer, const LayerCache& cache);
  void attend_many(const Member& self, const Layer& layer, const LayerCache& cache);
  void attend(const Layer& layer, std::int64_t head, std::int64_t span, Range seen, const LayerCache& cache,
              const float* queries, float* partial, std::int64_t stride) const;
  void put(const Layer& layer, std::int64_t token, std::int64_t head, const float* found);

  // In decoder_feedforward.cpp:
  void feedforward(const Member& self, const Layer& layer, const Norm& next);
  void activate_rows(const Member& self, const Layer& layer) const;
  void activate_halves(const Member& self, const Layer& layer);
  void fire(const Member& self, const Layer& layer, Range rows, const Inputs& inputs, std::int64_t stride) const;

  // Whether `up` is computed for those neurons only whose gate lets them.
  bool fires(const Layer& layer) const { return request_.sparse && layer.gate_limits; }

  // Tokens, heads or spans are dealt out one by one, since there are few of them and they cost about the same.
  template <typename Use>
  static void each(const Member& self, std::int64_t count, Use&& use) {
    for (std::int64_t i = self.number; i < count; i += self.members) use(i);
  }

  // use(rows) for what a member has of a matrix, in pieces whose weights stay in the cache while all tokens use them.
  template <typename Use>
  static void in_pieces(const Member& self, const Matrix& matrix, Use&& use) {
    const auto [first, last] = matrix.part(self.number);
    const std::int64_t step = self.tokens == 1 ? std::max<std::int64_t>(last - first, 1) : matrix.piece();
    for (std::int64_t row = first; row < last; row += step) use(Range{row, std::min(row + step, last)});
  }

  void product(const Matrix& matrix, Range rows, const Inputs& inputs, const Outputs& outputs) const {
    if (request_.exact && matrix.rounds()) matrix.multiply_exactly(kernels_, rows, inputs, outputs);
    else matrix.multiply(kernels_, rows, inputs, outputs, request_.sparse);
  }

  // Whether the live inputs of a matrix are divided into halves, and not only its rows: then a thread reads whole
  // lines, or longer pieces of them, which memory gives sooner. How they are divided does not depend on the number of
  // threads.
  static bool halved(const Member& self, const Matrix& matrix) {
    return self.tokens == 1 && matrix.kind == Matrix::Kind::channels;
  }

  // Add the other half of what `multiply_halves` has put out, once all have met.
  void join(const Member& self, const Matrix& matrix, float* outputs, const float* others, std::int64_t count) const {
    if (halved(self, matrix)) kernels_.steps.add(outputs, others, count);
  }

  void normalise(const Norm& norm, const float* source, float* target, std::int64_t count) const {
    kernels_.steps.normalise(source, norm.weight, norm.epsilon, target, count);
  }

  // Zeros behind the inputs of a matrix, up to where its kernel may read.
  static void clear(float* line, std::int64_t count) { std::fill(line + count, line + padded(count), 0.0f); }

  Decoder& decoder_;
  const Kernels& kernels_;
  const Request& request_;
  const Cache& cache_;
  const std::int64_t wide_;  // from one input vector to the next
  std::vector<std::pair<std::int64_t, float>> best_;  // token and logit of each member; below 0: it had none to look at
  float *stream_, *inputs_;                     // the residual stream, and what the next matrices take of it
  float* results_;                              // of the last matrix of attention or of a feed-forward layer
  float *queries_, *keys_, *values_, *mixed_;   // of attention, `mixed_` being what its last matrix takes
  float *gates_, *ups_;                         // of a feed-forward layer, in the memory of queries and keys
  float* partial_;                              // results of attention for single spans
  float* halves_[3];                            // the second ones of matrices that run at the same time
  Barrier barrier_;
  std::chrono::steady_clock::time_point before_;
  std::array<double, kKinds> seconds_{};
};

}  // namespace gossamer
