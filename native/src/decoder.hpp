// One step of a decoder-only language model as one call: from token ids to logits.
//
// All threads stay in one parallel region from the first matrix to the last and meet at barriers that spin: a region
// for every matrix would cost more than a small matrix does. Which thread computes a row does not change how it is
// computed, so that logits do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "decoder_matrix.hpp"

namespace gossamer {

struct Norm {
  const float* weight = nullptr;  // null: there is none
  float epsilon = 0.0f;

  explicit operator bool() const { return weight != nullptr; }
};

struct Layer {
  Matrix query, key, value, output, gate, up, down;
  Norm before_attention, after_attention, before_feedforward, after_feedforward, query_norm, key_norm;
  std::int64_t heads = 0, key_heads = 0, dim = 0;
  std::int64_t window = 0;        // positions that are seen; 0: all
  float scale = 1.0f, cap = 0.0f;
  const float* cosines = nullptr;  // positions × rotary
  const float* sines = nullptr;
  std::int64_t rotary = 0;
  Activation activation = Activation::silu;
  const float* gate_limits = nullptr;  // activations of at most this size count as zero, and `up` is not computed there
};

// Keys and values of all layers in one piece of memory: for each layer first keys, then values.
struct Cache {
  unsigned char* memory;
  std::int64_t capacity;  // positions, a multiple of kSpan
  Value value;            // float32 or bfloat16
};

struct Request {
  const std::int64_t* tokens;
  int count;
  std::int64_t position;  // of the first of these tokens
  float* logits;
  bool every;             // logits of every token, not only of the last
  int threads;
  bool exact;             // no inputs are rounded, which is slow
  bool sparse;            // limits of activations hold
};

class Decoder {
 public:
  Decoder(Matrix embedding, float embedding_scale, Norm last_norm, Matrix head, float logit_cap,
          std::vector<Layer> layers);

  // Append tokens to the cache; logits go where the request says. Returns the most likely next token.
  std::int64_t step(const Request& request, const Cache& cache);

  // Bytes of a cache for so many positions.
  std::int64_t cache_bytes(std::int64_t capacity, Value value) const;

  // Seconds that were spent in each kind of work since this was last asked for; empty unless `watch` is on.
  std::vector<double> seconds();
  void watch(bool wanted) { watching_ = wanted; }

  // Whether limits of activations hold in the steps to come.
  void limit(bool wanted) { limited_ = wanted; }
  bool limited() const { return limited_; }

 private:
  class Run;  // one step, in decoder_run.hpp

  void divide(int parts);

  Matrix embedding_, head_;
  float embedding_scale_, logit_cap_;
  Norm last_norm_;
  std::vector<Layer> layers_;
  std::int64_t hidden_;
  std::int64_t widest_ = 0;  // line that a layer needs inside
  std::mutex busy_;
  bool watching_ = false, limited_ = true;
  std::vector<double> seconds_;
  std::vector<float> memory_;
  std::vector<float> ones_;  // as many as a layer has neurons, where a layer has limits for them
  int parts_ = 0;            // for which the rows of all matrices are divided
};

}  // namespace gossamer
