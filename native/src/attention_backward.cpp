// Gradients of attention: of queries row by row, of keys and values column by column, so that no sum is shared by
// threads.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention_packs.hpp"
#include "attention_problem.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

struct Tensors {
  Heads q, k, v, grads;
  const float* lse;     // (batch, heads, queries)
  const float* deltas;  // the same: Σ gradient · output, less the gradient of lse
  Heads to_q, to_k, to_v;
};

// Numbers of every query, filled up to whole panels: a query that sees nothing has no weights.
struct PerQuery {
  std::int64_t stride;
  Floats shifts, deltas;

  PerQuery(const Tensors& t, std::int64_t first, std::int64_t last)
      : stride(t.q.panels() * kPanel), shifts((last - first) * stride), deltas((last - first) * stride) {
    const std::int64_t queries = t.q.length;
    for (std::int64_t head = first; head < last; ++head)
      for (std::int64_t i = 0; i < stride; ++i) {
        const std::int64_t at = (head - first) * stride + i;
        const float lse = i < queries ? t.lse[head * queries + i] : -std::numeric_limits<float>::infinity();
        const bool none = lse == -std::numeric_limits<float>::infinity();
        shifts.get()[at] = none ? std::numeric_limits<float>::infinity() : lse * kPerLog2;
        deltas.get()[at] = i < queries ? t.deltas[head * queries + i] : 0.0f;
      }
  }
};

struct Scratch {
  Floats rows, grads, flow, weights, scores;

  Scratch(const Tensors& t)
      : rows(kTileRows * t.q.size), grads(kTileRows * t.v.size), flow(kTileRows * t.q.strips() * 16),
        weights(kTileRows * t.v.strips() * 16), scores(2 * kTileRows * kPiece * kPanel) {}
};

char* row_of(const Heads& tensor, std::int64_t batch, std::int64_t head, std::int64_t row) {
  return static_cast<char*>(tensor.head(batch, head)) + row * tensor.stride * tensor.bytes();
}

// Key heads first … last − 1 of the batch, whose vectors are packed in both forms.
class Round {
 public:
  Round(const Problem& p, const Tensors& t, const KeyBits& bits, std::int64_t first, std::int64_t last)
      : p_(p), t_(t), bits_(bits), first_(first), last_(last),
        keys_(t.k, p.key_heads, first, last, p.key_mask ? &bits : nullptr, p.threads),
        values_(t.v, p.key_heads, first, last, nullptr, p.threads),
        queries_(t.q, p.heads, first * p.group(), last * p.group(), nullptr, p.threads),
        grads_(t.grads, p.heads, first * p.group(), last * p.group(), nullptr, p.threads),
        per_query_(t, first * p.group(), last * p.group()),
        real_queries_(real_keys(nullptr, p.queries)) {}

  void to_queries() const {
    const Tiles tiles(p_.queries, p_.blocks.height);
    share_items((last_ - first_) * p_.group() * tiles.size(), p_.threads, [&] {
      auto scratch = std::make_shared<Scratch>(t_);
      return [&, scratch](std::int64_t item) {
        query_tile(item / tiles.size(), tiles[tiles.size() - 1 - item % tiles.size()], *scratch);
      };
    });
  }

  void to_keys() const {
    const Tiles tiles(p_.keys, p_.blocks.width);
    share_items((last_ - first_) * tiles.size(), p_.threads, [&] {
      auto scratch = std::make_shared<Scratch>(t_);
      return [&, scratch](std::int64_t item) { key_tile(item / tiles.size(), tiles[item % tiles.size()], *scratch); };
    });
  }

 private:
  void query_tile(std::int64_t local, const Tiles::Tile& at, const Scratch& own) const {
    const std::int64_t key_head = local / p_.group(), all = first_ * p_.group() + local, batch = all / p_.heads;
    const std::int64_t head = all % p_.heads;
    const AttentionKernels& kernel = attention_kernels();
    PanelList list(of_batch(bits_, batch));
    columns_of(p_, batch, head, at, false, list);
    kernel.rows(t_.q.vectors(batch, head), at.first, at.first + at.count, p_.scale * kPerLog2, own.rows.get());
    kernel.rows(t_.grads.vectors(batch, head), at.first, at.first + at.count, 1.0f, own.grads.get());
    std::fill_n(own.flow.get(), at.count * t_.q.strips() * 16, 0.0f);
    const float* shifts = per_query_.shifts.get() + local * per_query_.stride + at.first;
    const float* deltas = per_query_.deltas.get() + local * per_query_.stride + at.first;
    kernel.gradient({own.rows.get(), own.grads.get(), at.count, p_.of_queries(at.first), list.data(), list.size(),
                     keys_.columns(key_head), values_.columns(key_head), shifts, deltas, false, own.flow.get(),
                     nullptr, own.scores.get()});
    kernel.write(own.flow.get(), at.count, t_.q.strips(), p_.scale, t_.q.size, t_.to_q.value,
                 row_of(t_.to_q, batch, head, at.first), t_.to_q.stride);
  }

  void key_tile(std::int64_t local, const Tiles::Tile& at, const Scratch& own) const {
    const std::int64_t key_head = first_ + local, batch = key_head / p_.key_heads, shared = key_head % p_.key_heads;
    const AttentionKernels& kernel = attention_kernels();
    kernel.rows(t_.k.vectors(batch, shared), at.first, at.first + at.count, p_.scale * kPerLog2, own.rows.get());
    kernel.rows(t_.v.vectors(batch, shared), at.first, at.first + at.count, 1.0f, own.grads.get());
    const std::int64_t width = t_.k.strips() * 16, value_width = t_.v.strips() * 16;
    std::fill_n(own.flow.get(), at.count * width, 0.0f);
    std::fill_n(own.weights.get(), at.count * value_width, 0.0f);
    PanelList list(real_queries_);
    for (std::int64_t i = 0; i < p_.group(); ++i) {
      const std::int64_t query_head = local * p_.group() + i;
      columns_of(p_, batch, shared * p_.group() + i, at, true, list);
      kernel.gradient({own.rows.get(), own.grads.get(), at.count, p_.of_keys(at.first), list.data(), list.size(),
                       queries_.columns(query_head), grads_.columns(query_head),
                       per_query_.shifts.get() + query_head * per_query_.stride,
                       per_query_.deltas.get() + query_head * per_query_.stride, true, own.flow.get(),
                       own.weights.get(), own.scores.get()});
    }
    for (int row = 0; row < at.count; ++row)
      if (p_.key_mask && !p_.key_mask[batch * p_.keys + at.first + row]) {
        std::fill_n(own.flow.get() + row * width, width, 0.0f);
        std::fill_n(own.weights.get() + row * value_width, value_width, 0.0f);
      }
    kernel.write(own.flow.get(), at.count, t_.k.strips(), p_.scale, t_.k.size, t_.to_k.value,
                 row_of(t_.to_k, batch, shared, at.first), t_.to_k.stride);
    kernel.write(own.weights.get(), at.count, t_.v.strips(), 1.0f, t_.v.size, t_.to_v.value,
                 row_of(t_.to_v, batch, shared, at.first), t_.to_v.stride);
  }

  const Problem& p_;
  const Tensors& t_;
  const KeyBits& bits_;
  std::int64_t first_, last_;
  PackedHeads keys_, values_, queries_, grads_;
  PerQuery per_query_;
  std::vector<std::uint16_t> real_queries_;
};

}  // namespace

void bind_attention_backward(nb::module_& m) {
  m.def("attention_backward", [](const nb::tuple& problem, const nb::tuple& q, const nb::tuple& k, const nb::tuple& v,
                                 const nb::tuple& grads, Address lse, Address deltas, const nb::tuple& to_q,
                                 const nb::tuple& to_k, const nb::tuple& to_v) {
    const Problem p = Problem::from(problem);
    const Tensors t{Heads::from(q), Heads::from(k), Heads::from(v), Heads::from(grads),
                    reinterpret_cast<const float*>(lse),
                    reinterpret_cast<const float*>(deltas), Heads::from(to_q), Heads::from(to_k), Heads::from(to_v)};
    const nb::gil_scoped_release unlocked;
    const KeyBits bits = key_bits(p);
    const std::int64_t numbers = (t.k.panels() + p.group() * t.q.panels()) * kPanel * 2 * (t.k.size + t.v.size);
    in_rounds(p.batch * p.key_heads, numbers, [&](std::int64_t first, std::int64_t last) {
      const Round round(p, t, bits, first, last);
      round.to_queries();
      round.to_keys();
    });
  });
}

}  // namespace gossamer
