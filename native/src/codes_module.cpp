// Sparse codes as Python calls them: products with what rows hold, and which features they come to hold.
//
// No row is divided among threads, so that no result depends on their number.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "codes.hpp"
#include "cpu.hpp"
#include "matrix_registers.hpp"
#include "parallel.hpp"
#include "products.hpp"

namespace nb = nanobind;

namespace gossamer {

const CodeKernels& code_kernels() {
  const std::string& name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::code_table();
  if (name == "avx512") return avx512::code_table();
  if (name == "avx2") return avx2::code_table();
#endif
  if (name != "plain") throw std::invalid_argument("no kernels of codes for instruction set '" + name + "'");
  return plain::code_table();
}

namespace {

// Memory of a thread that is kept from call to call, aligned to cache lines.
class Room {
 public:
  template <typename T>
  T* get(std::size_t count) {
    const std::size_t bytes = count * sizeof(T) + 64;
    if (bytes > size_) {
      memory_.reset(new char[bytes]);
      size_ = bytes;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
  std::size_t size_ = 0;
};

template <typename Item>
void share_out(std::int64_t items, int threads, Item&& item) {
  std::atomic<std::int64_t> next{0};
  parallel(static_cast<int>(std::clamp<std::int64_t>(items, 1, std::max(threads, 1))), [&](int, int) {
    for (std::int64_t i = next++; i < items; i = next++) item(i);
  });
}

// ------------------------------------------------------------------------------------------------ the highest of rows

struct Spare {
  std::vector<float> numbers;
  std::vector<std::int32_t> places;
  std::int64_t room;

  explicit Spare(std::int64_t wanted)
      : room((std::max<std::int64_t>(2 * wanted, 224) + 47) / 16 * 16) {
    numbers.resize(static_cast<std::size_t>(2 * room + 16));
    places.resize(static_cast<std::size_t>(room + 16));
  }
};

constexpr std::int64_t kRowsAtOnce = 16;

// Returns the first row with a NaN, or −1.
std::int64_t highest_of_rows(std::int64_t rows, std::int64_t columns, std::int64_t stride, Address scores, Value value,
                             std::int64_t wanted, bool positive, std::int32_t* indices, float* values,
                             std::int64_t* counts, int threads) {
  std::atomic<std::int64_t> bad{rows};
  const std::int64_t bytes = value == Value::float32 ? 4 : 2;
  share_out((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads, [&](std::int64_t item) {
    Spare spare(wanted);
    for (std::int64_t row = item * kRowsAtOnce; row < std::min(rows, (item + 1) * kRowsAtOnce); ++row) {
      const std::int64_t found = code_kernels().highest(
          at<void>(scores + static_cast<Address>(row * stride * bytes)), value, columns, wanted, positive,
          indices + row * wanted, values + row * wanted, spare.numbers.data(), spare.places.data(), spare.room);
      counts[row] = std::max<std::int64_t>(found, 0);
      if (found >= 0) continue;
      std::int64_t first = bad;
      while (row < first && !bad.compare_exchange_weak(first, row)) {}
    }
  });
  return bad == rows ? -1 : bad.load();
}

// ------------------------------------------------------------------------------------------------ encode and select

constexpr std::int64_t kGroups = 8;        // of 32 tokens, that a thread compares with a tile of features
constexpr std::int64_t kFewTokens = 4;     // for which no group is worth filling
constexpr std::int64_t kRoom = 256;        // candidates of a token, at least

struct Problem {
  std::int64_t tokens, size, features, wanted;
  const float* x;
  const float* encoder;
  const float* bias;
  std::int32_t* indices;
  float* values;
  std::int64_t* counts;
  bool tiles;

  std::int64_t padded() const { return (size + 31) / 32 * 32; }
  std::int64_t blocks() const { return (features + kMarginRows - 1) / kMarginRows; }
  std::int64_t room() const { return (std::max(kRoom, 4 * wanted + 64) + 15) / 16 * 16; }
  Dictionary dictionary() const { return {encoder, Value::float32, size}; }
};

// Features as they are compared with tokens, and what their rounding can amount to, for every block of them.
struct Prepared {
  float* lengths;
  float* errors;
  std::uint16_t* rounded;  // or null
};

void prepare(const Problem& problem, const Prepared& found, int threads) {
  std::uint16_t* rounded = problem.tiles ? found.rounded : nullptr;
  if (rounded)
    std::fill(rounded + problem.features * problem.padded(),
              rounded + problem.blocks() * kMarginRows * problem.padded(), std::uint16_t{0});
  else
    std::fill_n(found.errors, problem.blocks(), 0.0f);  // margins are sums over both, and 0 · NaN is NaN
  share_out((problem.blocks() + 7) / 8, threads, [&](std::int64_t item) {
    const std::int64_t first = item * 8 * kMarginRows, last = std::min(problem.features, first + 8 * kMarginRows);
    if (rounded)
      code_kernels().round_rows(problem.dictionary(), first, last, problem.padded(), rounded, found.lengths,
                                found.errors);
    else
      code_kernels().lengths(problem.dictionary(), first, last, found.lengths);
  });
}

// Candidates of some groups of tokens.
class Collection {
 public:
  Collection(const Problem& problem, std::int64_t first, std::int64_t groups, Room& memory)
      : problem_(problem), first_(first), groups_(groups),
        lists_(static_cast<std::size_t>(groups * kTokens)),
        of_token_(lists_.size(), 0.0f), length_(lists_.size(), 0.0f), error_(lists_.size(), 0.0f),
        limits_(lists_.size(), 0.0f) {
    const std::int64_t lists = groups * kTokens, room = problem.room(), channels = problem.padded();
    float* scores = memory.get<float>(static_cast<std::size_t>(lists * (2 * room + channels) + channels));
    packed_ = scores + 2 * lists * room;
    row_ = reinterpret_cast<std::uint16_t*>(packed_ + lists * channels);
    auto* features = reinterpret_cast<std::int32_t*>(scores + lists * room);
    for (std::int64_t list = 0; list < lists; ++list)
      lists_[static_cast<std::size_t>(list)] = {scores + list * room, features + list * room, 0};
    for (std::int64_t group = 0; group < groups; ++group) pack(group);
  }

  void go_through(const Prepared& features) {
    alignas(64) float scores[kTileRows * kTokens];
    const Margins margins{features.lengths, features.errors};
    const int rows = problem_.tiles ? kTileRows : code_kernels().score_rows;
    for (std::int64_t feature = 0; feature < problem_.features; feature += rows) {
      const int here = static_cast<int>(std::min<std::int64_t>(rows, problem_.features - feature));
      for (std::int64_t group = 0; group < groups_; ++group) {
        ScoreTile tile{nullptr, packed(group), problem_.size, here, scores};
        if (problem_.tiles) {
          tile.size = problem_.padded();
          tile.features = features.rounded + feature * tile.size;
          score_tile(tile);
        } else {
          tile.features = problem_.encoder + feature * problem_.size;
          code_kernels().score(tile);
        }
        code_kernels().collect(scores, problem_.bias, feature, here, margins, of(group));
      }
    }
  }

  // Exact scores of the candidates, and the best of them.
  void choose(const Prepared& features) {
    const Margins margins{features.lengths, features.errors};
    std::vector<float> scores, every;
    std::vector<std::int32_t> places;
    Spare spare(problem_.wanted);
    for (std::int64_t group = 0; group < groups_; ++group)
      for (int i = 0; i < tokens(group); ++i) {
        const auto list = static_cast<std::size_t>(group * kTokens + i);
        const std::int64_t token = first_ + group * kTokens + i;
        Candidates& found = lists_[list];
        code_kernels().sift(found, problem_.wanted, margins, of_token_[list], length_[list],
                            static_cast<std::int32_t>(problem_.room()), limits_[list]);
        choose_of(problem_, token, found.count < 0 ? nullptr : found.features,
                  found.count < 0 ? problem_.features : found.count, every, spare);
      }
  }

  static void choose_of(const Problem& problem, std::int64_t token, const std::int32_t* listed, std::int64_t count,
                        std::vector<float>& scores, Spare& spare) {
    scores.resize(static_cast<std::size_t>(count));
    code_kernels().exact(problem.dictionary(), problem.x + token * problem.size, problem.bias, listed, count,
                         scores.data());
    std::int32_t* indices = problem.indices + token * problem.wanted;
    const std::int64_t found = code_kernels().highest(
        scores.data(), Value::float32, count, problem.wanted, true, indices, problem.values + token * problem.wanted,
        spare.numbers.data(), spare.places.data(), spare.room);
    problem.counts[token] = found;
    if (listed)
      for (std::int64_t i = 0; i < found; ++i) indices[i] = listed[indices[i]];
  }

 private:
  int tokens(std::int64_t group) const {
    return static_cast<int>(std::clamp<std::int64_t>(problem_.tokens - first_ - group * kTokens, 0, kTokens));
  }
  // sixteen bits for a number are half of what there is room for
  float* packed(std::int64_t group) const { return packed_ + group * kTokens * problem_.padded(); }
  Group of(std::int64_t group) {
    const auto list = static_cast<std::size_t>(group * kTokens);
    return {lists_.data() + list, tokens(group), static_cast<std::int32_t>(problem_.room()), problem_.wanted,
            of_token_.data() + list, length_.data() + list, limits_.data() + list};
  }
  void pack(std::int64_t group) {
    const auto list = static_cast<std::size_t>(group * kTokens);
    const float* x = problem_.x + (first_ + group * kTokens) * problem_.size;
    if (problem_.tiles)
      code_kernels().pack_bfloat16(x, problem_.size, problem_.padded(), tokens(group),
                                   reinterpret_cast<std::uint16_t*>(packed(group)), row_, length_.data() + list,
                                   error_.data() + list);
    else
      code_kernels().pack(x, problem_.size, tokens(group), packed(group), length_.data() + list);
    // sums of either kind are rounded too, in whatever order: at most half a unit for every channel
    const float sums = 1.5f * 1.1920929e-07f * static_cast<float>(problem_.size);
    for (auto i = list; i < list + static_cast<std::size_t>(tokens(group)); ++i) {
      of_token_[i] = length_[i] > 0.0f ? 1.001f * (error_[i] + sums * length_[i]) + 1e-30f : 0.0f;
      length_[i] = problem_.tiles ? 1.01f * length_[i] : 0.0f;
    }
  }

  const Problem& problem_;
  std::int64_t first_, groups_;
  std::vector<Candidates> lists_;
  std::vector<float> of_token_, length_, error_, limits_;
  float* packed_;
  std::uint16_t* row_;
};

// False where the encoder holds NaN or infinity. `ready`: the features have been prepared before.
bool encode(const Problem& problem, const Prepared& features, bool ready, int threads) {
  if (problem.tokens <= kFewTokens) {
    share_out(problem.tokens, threads, [&](std::int64_t token) {
      std::vector<float> scores;
      Spare spare(problem.wanted);
      Collection::choose_of(problem, token, nullptr, problem.features, scores, spare);
    });
    return true;
  }
  if (!ready) prepare(problem, features, threads);
  for (std::int64_t block = 0; block < problem.blocks(); ++block)
    if (!std::isfinite(features.lengths[block])) return false;
  const std::int64_t all = (problem.tokens + kTokens - 1) / kTokens;
  const std::int64_t groups = std::clamp<std::int64_t>((all + threads - 1) / threads, 1, kGroups);
  share_out((all + groups - 1) / groups, threads, [&](std::int64_t item) {
    static thread_local Room memory;
    Collection found(problem, item * groups * kTokens, std::min(groups, all - item * groups), memory);
    {
      const MatrixRegisters registers(problem.tiles);
      found.go_through(features);
    }
    found.choose(features);
  });
  return true;
}

// ------------------------------------------------------------------------------------------------ turned codes

// For every feature the rows that hold it, ascending.
void turn(std::int64_t rows, std::int64_t width, const Listed& codes, std::int32_t* holders, float* values,
          std::int64_t* starts) {
  std::fill_n(starts, width + 1, std::int64_t{0});
  for (std::int64_t i = 0; i < codes.starts[rows]; ++i) ++starts[codes.indices[i] + 1];
  for (std::int64_t feature = 0; feature < width; ++feature) starts[feature + 1] += starts[feature];
  std::vector<std::int64_t> next(starts, starts + width);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t i = codes.starts[row]; i < codes.starts[row + 1]; ++i) {
      const std::int64_t place = next[static_cast<std::size_t>(codes.indices[i])]++;
      holders[place] = static_cast<std::int32_t>(row);
      values[place] = codes.values[i];
    }
}

Listed listed(Address indices, Address values, Address starts) {
  return {at<std::int32_t>(indices), at<float>(values), at<std::int64_t>(starts)};
}

}  // namespace

void bind_codes(nb::module_& m) {
  m.def("code_gather", [](std::int64_t rows, Address indices, Address values, Address starts, Address dictionary,
                          int value, std::int64_t size, Address outputs, int threads) {
    const Listed codes = listed(indices, values, starts);
    over_rows(Share{codes.starts, rows, 1}, threads, [&](std::int64_t first, std::int64_t last) {
      code_kernels().gather(codes, {at<void>(dictionary), static_cast<Value>(value), size}, first, last,
                            into<float>(outputs));
    });
  });
  m.def("code_products", [](std::int64_t rows, Address indices, Address starts, Address x, Address dictionary,
                            int value, std::int64_t size, Address found, int threads) {
    const Listed codes = listed(indices, 0, starts);
    over_rows(Share{codes.starts, rows, 1}, threads, [&](std::int64_t first, std::int64_t last) {
      code_kernels().products(codes, {at<void>(dictionary), static_cast<Value>(value), size}, at<float>(x), first,
                              last, into<float>(found));
    });
  });
  m.def("code_turn", [](std::int64_t rows, std::int64_t width, Address indices, Address values, Address starts,
                        Address holders, Address turned, Address turned_starts) {
    nb::gil_scoped_release unlocked;
    turn(rows, width, listed(indices, values, starts), into<std::int32_t>(holders), into<float>(turned),
         into<std::int64_t>(turned_starts));
  });
  m.def("code_highest", [](std::int64_t rows, std::int64_t columns, std::int64_t stride, Address scores, int value,
                           std::int64_t wanted, bool positive, Address indices, Address values, Address counts,
                           int threads) {
    nb::gil_scoped_release unlocked;
    return highest_of_rows(rows, columns, stride, scores, static_cast<Value>(value), wanted, positive,
                           into<std::int32_t>(indices), into<float>(values), into<std::int64_t>(counts), threads);
  });
  m.def("code_encode", [](std::int64_t tokens, std::int64_t size, std::int64_t features, std::int64_t wanted, Address x,
                          Address encoder, Address bias, Address lengths, Address errors, Address rounded, bool ready,
                          Address indices, Address values, Address counts, int threads) {
    nb::gil_scoped_release unlocked;
    const Problem problem{tokens, size, features, wanted, at<float>(x), at<float>(encoder), at<float>(bias),
                          into<std::int32_t>(indices), into<float>(values), into<std::int64_t>(counts),
                          rounded && matrix_registers_usable()};
    return encode(problem, {into<float>(lengths), into<float>(errors), into<std::uint16_t>(rounded)}, ready,
                  std::max(threads, 1));
  });
  m.def("code_tiles", &matrix_registers_usable);
  m.def("code_block", [] { return kMarginRows; });
  m.def("code_adam", [](std::int64_t rows, std::int64_t size, Address weights, Address means, Address squares,
                        Address gradients, double first, double second, double rate, double square_share,
                        double epsilon, bool unit, int threads) {
    const AdamRows all{into<float>(weights), into<float>(means), into<float>(squares), at<float>(gradients), size,
                       static_cast<float>(first), static_cast<float>(second), static_cast<float>(rate),
                       static_cast<float>(square_share), static_cast<float>(epsilon), unit};
    over_rows(Share{nullptr, rows, 0}, threads,
              [&](std::int64_t begin, std::int64_t end) { code_kernels().adam(all, begin, end); });
  });
}

}  // namespace gossamer
