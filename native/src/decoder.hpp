// One step of a decoder-only language model as one call: from token ids to logits.
//
// All threads stay in one parallel region from the first matrix to the last and meet at barriers that spin: a region
// for every matrix would cost more than a small matrix does. Which thread computes a row does not change how it is
// computed, so that logits do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels.hpp"

namespace gossamer {

// A weight in one of the storages that there are kernels for.
struct Matrix {
  enum class Kind : int {
    none = 0,
    dense = 1,
    bitmask = 2,
    groups = 3,
    nibbles = 4,
    blocks = 5,
    patterns = 6,
    channels = 7,     // a line for each input
    nibble_rows = 8,  // a line for each output
    integer_dense = 9,     // these two only in what Python hands over:
    integer_bitmask = 10,  // they become dense and bitmask with `rounded`
  };

  Kind kind = Kind::none;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const float* bias = nullptr;
  DenseRows dense{};
  BitmaskRows bitmask{};
  GroupRows groups{};
  NibbleRows nibbles{};
  BlockRows blocks{};
  PatternRows patterns{};
  ChannelLines lines{};
  const float* limits = nullptr;  // channels: inputs of at most this size count as zero
  bool rounded = false;           // dense and bitmask in int8: inputs are rounded to int8 as well

  explicit operator bool() const { return kind != Kind::none; }
  bool rounds() const { return rounded || kind == Kind::nibbles || kind == Kind::groups; }
  // where the stored values of each row, or band of rows, begin; null if all rows are alike
  const std::int64_t* starts() const;
  std::int64_t band() const { return kind == Kind::blocks ? blocks.height : 1; }
  // `sparse`: with limits, where there are any
  void multiply(const Kernels& kernels, std::int64_t first, std::int64_t last, const Inputs& inputs,
                const Outputs& outputs, bool sparse) const;
  // Of `channels`: what one half of the live inputs adds to the rows first … last − 1, the bias with the first half.
  void multiply_half(const Kernels& kernels, int half, std::int64_t first, std::int64_t last, const Inputs& inputs,
                     const Outputs& outputs, bool sparse) const;
  // The rows `places` alone.
  void multiply_some(const Kernels& kernels, const std::int32_t* places, std::int64_t count, const Inputs& inputs,
                     const Outputs& outputs) const;
  // The same with dense rows and without rounding.
  void multiply_exactly(const Kernels& kernels, std::int64_t first, std::int64_t last, const Inputs& inputs,
                        const Outputs& outputs) const;
  void expand_row(const Kernels& kernels, std::int64_t row, float* target) const;
};

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
  class Run;

  void divide(int parts);

  Matrix embedding_, head_;
  float embedding_scale_, logit_cap_;
  Norm last_norm_;
  std::vector<Layer> layers_;
  std::int64_t hidden_, widest_;
  std::mutex busy_;
  bool watching_ = false, limited_ = true;
  std::vector<double> seconds_;
  std::vector<float> memory_;
  std::vector<float> ones_;  // as many as a layer has neurons, where a layer has limits for them
  int parts_ = 0;                                // for which
  std::vector<std::vector<std::int64_t>> cuts_;  // the rows of each matrix are divided here
};

}  // namespace gossamer
