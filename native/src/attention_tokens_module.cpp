// Attention over listed tokens as Python calls it, and the choice of tokens by labels.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "attention_problem.hpp"
#include "attention_tokens.hpp"
#include "cpu.hpp"

namespace nb = nanobind;

namespace gossamer {

const TokenKernels& token_kernels() {
  const std::string& name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::token_table();
  if (name == "avx512") return avx512::token_table();
  if (name == "avx2") return avx2::token_table();
#endif
  if (name != "plain") throw std::invalid_argument("no attention kernels for instruction set '" + name + "'");
  return plain::token_table();
}

namespace {

constexpr std::int64_t kList = 512;       // tokens of a list that one thread reads
constexpr std::int64_t kLabels = 8192;    // labels that one thread goes through

// Lists of tokens, of which each is read by the queries of some adjacent heads.
struct Lists {
  std::int64_t lists;      // of one batch
  std::int64_t length;     // of each
  Address places;
  bool wide;
  const std::int64_t* counts;  // of each list, or null
  int threads;
  float scale;

  std::int64_t count(std::int64_t list) const { return counts ? counts[list] : length; }
  TokenList tokens(std::int64_t list) const {
    return {reinterpret_cast<const void*>(places + static_cast<Address>(list * length * (wide ? 8 : 4))), wide};
  }
};

// What some tokens contribute to rows, in memory one after the other: sums of values, highest score, total.
struct Parts {
  std::int64_t rows, strips, pieces;
  Floats sums, most, total;

  Parts(std::int64_t items, std::int64_t pieces, std::int64_t rows, std::int64_t strips)
      : rows(rows), strips(strips), pieces(pieces), sums(items * pieces * rows * strips * 16),
        most(items * pieces * rows),
        total(items * pieces * rows) {}
};

// Writes one row of a list from the parts that its pieces contribute.
void merge(const Parts& parts, std::int64_t list, std::int64_t pieces, std::int64_t row, std::int64_t size,
           Value value, void* target,
           float* lse) {
  const std::int64_t width = parts.strips * 16;
  float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
  const auto place = [&](std::int64_t piece) { return (list * parts.pieces + piece) * parts.rows + row; };
  for (std::int64_t piece = 0; piece < pieces; ++piece) most = std::max(most, parts.most.get()[place(piece)]);
  const float shift = std::isinf(most) && most < 0 ? 0.0f : most;
  std::vector<float> sums(static_cast<std::size_t>(width), 0.0f);
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    const float share = std::exp2(parts.most.get()[place(piece)] - shift);
    total += share * parts.total.get()[place(piece)];
    const float* from = parts.sums.get() + place(piece) * width;
    for (std::int64_t i = 0; i < width; ++i) sums[static_cast<std::size_t>(i)] += share * from[i];
  }
  attention_kernels().write(sums.data(), 1, parts.strips, total == 0.0f ? 0.0f : 1.0f / total, size, value, target,
                            size);
  if (lse) *lse = total == 0.0f ? -std::numeric_limits<float>::infinity() : most / kPerLog2 + std::log(total);
}

// Attention of queries over the tokens of their lists. outputs: (batch, heads, queries, size), adjacent; lse without size,
// or null.
class Gathering {
 public:
  struct Scratch {
    Floats scores, queries;
  };

  Gathering(const Lists& lists, std::int64_t batch, std::int64_t heads, std::int64_t key_heads, const Heads& q,
            const Heads& k, const Heads& v, const Heads& outputs, float* lse)
      : lists_(lists), q_(q), k_(k), v_(v), outputs_(outputs), lse_(lse), key_heads_(key_heads),
        group_(heads / lists.lists), rows_(group_ * q.length), padded_((q.size + 15) / 16 * 16),
        pieces_(std::max<std::int64_t>((lists.length + kList - 1) / kList, 1)), all_(batch * lists.lists),
        parts_(all_, pieces_, rows_, v.strips()) {}

  std::int64_t pieces() const { return pieces_; }  // of a list, each of at most kList tokens
  std::int64_t all() const { return all_; }        // lists
  Scratch scratch() const { return {Floats(kTileRows * kTokens), Floats(kTileRows * padded_)}; }

  // False if a listed token does not exist: then nothing is read.
  bool read(std::int64_t list, std::int64_t piece, const Scratch& scratch) const {
    const std::int64_t b = list / lists_.lists, key_head = list % lists_.lists * key_heads_ / lists_.lists;
    const std::int64_t first = piece * kList, last = std::min(first + kList, lists_.count(list));
    const std::int64_t asked_for = std::min(first + kList + kTokens, lists_.length);  // at most so far, when they are read
    if (!lists_.tokens(list).inside(first, asked_for, k_.length)) return false;
    if (first >= last) return true;
    for (std::int64_t row = 0; row < rows_; row += kTileRows) {
      const std::int64_t count = std::min<std::int64_t>(kTileRows, rows_ - row);
      const std::int64_t at = (list * pieces_ + piece) * rows_ + row;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t head = list % lists_.lists * group_ + (row + i) / q_.length, query = (row + i) % q_.length;
        float* to = scratch.queries.get() + i * padded_;
        std::fill_n(to, padded_, 0.0f);
        attention_kernels().rows(q_.vectors(b, head), query, query + 1, lists_.scale * kPerLog2, to);
      }
      token_kernels().gather({scratch.queries.get(), count, k_.vectors(b, key_head), v_.vectors(b, key_head),
                              lists_.tokens(list), first, last, lists_.count(list), parts_.sums.get() + at * parts_.strips * 16,
                              parts_.most.get() + at, parts_.total.get() + at, scratch.scores.get()});
    }
    return true;
  }

  // Once all pieces of a list have been read.
  void finish(std::int64_t list) const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t at = list * rows_ + row;  // lists are in the order of heads
      merge(parts_, list, (lists_.count(list) + kList - 1) / kList, row, v_.size, outputs_.value,
            reinterpret_cast<char*>(outputs_.data) + at * v_.size * outputs_.bytes(), lse_ ? lse_ + at : nullptr);
    }
  }

 private:
  const Lists& lists_;
  const Heads &q_, &k_, &v_, &outputs_;
  float* lse_;
  std::int64_t key_heads_, group_, rows_, padded_, pieces_, all_;
  Parts parts_;
};

// False if a listed token does not exist: then outputs mean nothing.
bool gather(const Gathering& work, int threads) {
  std::atomic<bool> inside{true};
  share_items(work.all() * work.pieces(), threads, [&] {
    auto scratch = std::make_shared<Gathering::Scratch>(work.scratch());
    return [&, scratch](std::int64_t item) {
      if (inside && !work.read(item / work.pieces(), item % work.pieces(), *scratch)) inside = false;
    };
  });
  if (!inside) return false;
  for (std::int64_t list = 0; list < work.all(); ++list) work.finish(list);
  return true;
}

// Where the codes of rounded labels lie, or nowhere.
struct Codes {
  Address data = 0;
  std::int64_t batch_stride = 0, head_stride = 0, stride = 0;
  int bits = 0;
  Heads low{}, step{};

  // (address, three strides, bits, low, step), or ()
  static Codes from(const nb::tuple& given) {
    if (!nb::len(given)) return {};
    const auto number = [&](int i) { return nb::cast<std::int64_t>(given[static_cast<std::size_t>(i)]); };
    return {nb::cast<Address>(given[0]), number(1), number(2), number(3), nb::cast<int>(given[4]),
            Heads::from(nb::cast<nb::tuple>(given[5])), Heads::from(nb::cast<nb::tuple>(given[6]))};
  }
  RoundedLabels labels(std::int64_t b, std::int64_t head, std::int64_t size) const {
    const Address codes = data + static_cast<Address>(b * batch_stride + head * head_stride);
    return {reinterpret_cast<const std::uint8_t*>(codes), stride, low.length, size, bits, low.vectors(b, head),
            step.vectors(b, head)};
  }
};

// Labels that choose tokens: q (batch, heads, 1, labels), k (batch, key heads, keys, labels).
struct Labels {
  std::int64_t batch, heads, key_heads;
  Heads q, k;
  Codes codes;                   // those of k, if they are rounded
  int pooling;                   // 0 sum, 1 highest, 2 none
  const std::uint8_t* key_mask;  // (batch, keys), or null
  const std::int64_t* channels = nullptr;  // (key heads, labels): which channels of q are its labels, if not all

  bool channels_exist() const {
    const std::int64_t *end = channels + key_heads * k.size, size = q.size;
    return std::all_of(channels, end, [size](std::int64_t one) { return 0 <= one && one < size; });
  }

  // Adds the labels of a query, rounded as those of keys are.
  void add_query(std::int64_t b, std::int64_t head, float* query) const {
    std::vector<float> all(static_cast<std::size_t>(q.size + 16), 0.0f);
    attention_kernels().rows(q.vectors(b, head), 0, 1, 1.0f, all.data());
    const std::int64_t* picked = channels ? channels + head * key_heads / heads * k.size : nullptr;
    for (std::int64_t i = 0; i < k.size; ++i) {
      float one = all[static_cast<std::size_t>(picked ? picked[i] : i)];
      if (!codes.data && k.value == Value::bfloat16 && q.value == Value::float32) {
        std::uint16_t narrow;
        kernels().narrow_bfloat16(&one, &narrow, 1);
        kernels().widen_bfloat16(&narrow, &one, 1);
      }
      query[i] += one;
    }
  }

  std::int64_t lists() const { return pooling == 2 ? heads : key_heads; }  // of one batch

  // Scores of the keys first … last − 1 for one list.
  void score(std::int64_t list, std::int64_t first, std::int64_t last, float* scores) const {
    const std::int64_t b = list / lists(), per_list = heads / lists(), head = list % lists() * per_list;
    const std::int64_t label_head = head * key_heads / heads;
    const auto score_some = [&](const float* query, float* found) {
      if (codes.data) token_kernels().score_rounded(codes.labels(b, label_head, k.size), query, first, last, found);
      else token_kernels().score(k.vectors(b, label_head), query, first, last, found);
    };
    const float lowest = -std::numeric_limits<float>::infinity();
    std::vector<float> query(static_cast<std::size_t>(k.size), 0.0f);
    std::vector<float> some(pooling == 1 ? static_cast<std::size_t>(last - first) : 0);
    for (std::int64_t i = 0; i < per_list; ++i) {
      add_query(b, head + i, query.data());
      if (pooling != 1) continue;
      score_some(query.data(), i ? some.data() : scores);
      std::fill(query.begin(), query.end(), 0.0f);
      for (std::size_t t = 0; i && t < some.size(); ++t)
        if (!(some[t] <= scores[t])) scores[t] = std::isnan(scores[t]) ? scores[t] : some[t];
    }
    if (pooling != 1) score_some(query.data(), scores);
    if (key_mask)
      for (std::int64_t key = first; key < last; ++key)
        if (!key_mask[b * k.length + key]) scores[key - first] = lowest;
  }
};

// Room for the scores of a list, and for choosing from them.
struct ChoiceScratch {
  Floats scores, room;

  static std::int64_t stride(std::int64_t keys) { return (keys + 31) / 16 * 16; }
  explicit ChoiceScratch(std::int64_t keys) : scores(stride(keys)), room(2 * stride(keys)) {}
};

// `count` tokens of every list, list after list. `then(list)`: what the thread that has chosen does with them, if every
// thread has lists of its own; else nothing, and the answer is false.
template <typename MakeThen>
bool label_topk(const Labels& labels, std::int64_t count, std::int64_t* places, std::int64_t step, int threads,
                MakeThen&& make_then) {
  const std::int64_t keys = labels.k.length, stride = ChoiceScratch::stride(keys), all = labels.batch * labels.lists();
  const auto choose = [&](std::int64_t list, float* scores, const Floats& room) {
    token_kernels().choose(scores, keys, count, places + list * step, room.get());
  };
  if (all >= threads) {  // and chooses from scores that are still in its cache
    share_items(all, threads, [&] {
      auto scratch = std::make_shared<ChoiceScratch>(keys);
      return [&, scratch, then = make_then()](std::int64_t list) {
        labels.score(list, 0, keys, scratch->scores.get());
        choose(list, scratch->scores.get(), scratch->room);
        then(list);
      };
    });
    return true;
  }
  const Floats scores(all * stride);
  const std::int64_t pieces = (keys + kLabels - 1) / kLabels;
  share_items(all * pieces, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t list = item / pieces, first = item % pieces * kLabels;
      labels.score(list, first, std::min(first + kLabels, keys), scores.get() + list * stride + first);
    };
  });
  share_items(all, threads, [&] {
    auto room = std::make_shared<Floats>(2 * stride);
    return [&, room](std::int64_t list) { choose(list, scores.get() + list * stride, *room); };
  });
  return false;
}

void label_topk(const Labels& labels, std::int64_t count, std::int64_t* places, int threads) {
  label_topk(labels, count, places, count, threads, [] { return [](std::int64_t) {}; });
}

// Chooses by labels and reads what is chosen, which then is still known in the cache of the thread that chose. With
// `newest` the key behind those that have labels is read as well.
void label_attention(const Labels& labels, std::int64_t count, bool newest, const Gathering& work,
                     std::int64_t* places, std::int64_t step, int threads) {
  if (newest)
    for (std::int64_t list = 0; list < work.all(); ++list) places[list * step + count] = labels.k.length;
  const bool done = label_topk(labels, count, places, step, threads, [&] {
    auto scratch = std::make_shared<Gathering::Scratch>(work.scratch());
    return [&work, scratch](std::int64_t list) {
      for (std::int64_t piece = 0; piece < work.pieces(); ++piece) work.read(list, piece, *scratch);
      work.finish(list);
    };
  });
  if (!done) gather(work, threads);
}

}  // namespace

void bind_attention_tokens(nb::module_& m) {
  m.def("attention_gather_listed", [](std::int64_t batch, std::int64_t heads, std::int64_t key_heads,
                                      const nb::tuple& q, const nb::tuple& k, const nb::tuple& v, std::int64_t lists,
                                      std::int64_t length, Address places, bool wide, Address counts, float scale,
                                      int threads, const nb::tuple& outputs, Address lse) {
    const Heads all[] = {Heads::from(q), Heads::from(k), Heads::from(v), Heads::from(outputs)};
    const nb::gil_scoped_release unlocked;
    const Lists chosen{lists, length, places, wide, reinterpret_cast<const std::int64_t*>(counts),
                       std::max(threads, 1), scale};
    return gather({chosen, batch, heads, key_heads, all[0], all[1], all[2], all[3], reinterpret_cast<float*>(lse)},
                  chosen.threads);
  });
  // False if there is no such channel.
  m.def("attention_by_labels", [](std::int64_t batch, std::int64_t heads, std::int64_t key_heads, const nb::tuple& q,
                                  const nb::tuple& k, const nb::tuple& v, Address channels,
                                  const nb::tuple& k_labels, const nb::tuple& codes, std::int64_t label_heads,
                                  int pooling, Address key_mask, std::int64_t count, bool newest, float scale,
                                  int threads, const nb::tuple& outputs) {
    const Heads all[] = {Heads::from(q), Heads::from(k), Heads::from(v), Heads::from(outputs)};
    const Labels labels{batch, heads, label_heads, all[0], Heads::from(k_labels), Codes::from(codes), pooling,
                        reinterpret_cast<const std::uint8_t*>(key_mask),
                        reinterpret_cast<const std::int64_t*>(channels)};
    const nb::gil_scoped_release unlocked;
    if (!labels.channels_exist()) return false;
    const std::int64_t step = count + (newest ? 1 : 0);
    std::vector<std::int64_t> places(static_cast<std::size_t>(batch * labels.lists() * step));
    const Lists chosen{labels.lists(), step, reinterpret_cast<Address>(places.data()), true, nullptr,
                       std::max(threads, 1), scale};
    const Gathering work(chosen, batch, heads, key_heads, all[0], all[1], all[2], all[3], nullptr);
    label_attention(labels, count, newest, work, places.data(), step, chosen.threads);
    return true;
  });
  m.def("attention_label_topk", [](std::int64_t batch, std::int64_t heads, std::int64_t key_heads, const nb::tuple& q,
                                   const nb::tuple& k, const nb::tuple& codes, int pooling, Address key_mask,
                                   std::int64_t count, Address places, int threads) {
    const Labels labels{batch, heads, key_heads, Heads::from(q), Heads::from(k), Codes::from(codes), pooling,
                        reinterpret_cast<const std::uint8_t*>(key_mask)};
    const nb::gil_scoped_release unlocked;
    label_topk(labels, count, reinterpret_cast<std::int64_t*>(places), std::max(threads, 1));
  });
}

}  // namespace gossamer
