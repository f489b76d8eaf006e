// Attention as Python calls it: heads are packed a few at a time, and their tiles divided among threads.
//
// gossamer.kernels.attention checks shapes and dtypes before; nothing here can.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_packs.hpp"
#include "attention_problem.hpp"
#include "cpu.hpp"
#include "matrix_registers.hpp"

namespace nb = nanobind;

namespace gossamer {

const AttentionKernels& attention_kernels() {
  const std::string& name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::attention_table();
  if (name == "avx512") return avx512::attention_table();
  if (name == "avx2") return avx2::attention_table();
#endif
  if (name != "plain") throw std::invalid_argument("no attention kernels for instruction set '" + name + "'");
  return plain::attention_table();
}

namespace {

constexpr std::int64_t kLeastQueries = 16;  // from which on matrix registers pay

// Those for tensors that all hold bfloat16, or do not. A scale of 0 would make NaN of −∞ behind exact products.
const AttentionKernels& kernels_for(const Problem& p, bool rounded) {
  const bool matrices = rounded && p.queries >= kLeastQueries && p.scale != 0.0f && matrix_registers_usable();
  return matrices ? attention_matrices() : attention_kernels();
}

bool rounded(const Heads& tensor) { return tensor.value != Value::float32; }

// Memory of a thread, which lets go of the matrix registers with it.
template <typename Scratch>
struct Held : Scratch {
  Held(bool matrices, Scratch&& scratch) : Scratch(std::move(scratch)), registers(matrices) {}
  MatrixRegisters registers;
};
template <typename Scratch>
std::shared_ptr<Held<Scratch>> hold(const AttentionKernels& kernels, Scratch&& scratch) {
  return std::make_shared<Held<Scratch>>(kernels.matrices, std::move(scratch));
}

// ------------------------------------------------------------------------------------------------ forward

void forward(const Problem& p, const Heads& q, const Heads& k, const Heads& v, const Heads& outputs, float* lse) {
  const KeyBits bits = key_bits(p);
  const Tiles tiles(p.queries, p.blocks.height);
  const AttentionKernels& kernels = kernels_for(p, rounded(q) && rounded(k) && rounded(v));
  const Packing packing(kernels, k.size), summed(kernels, v.size);
  const std::int64_t panels = paired_panels(p.keys), across = panels * packing.across, along = panels * summed.along;
  in_rounds(p.batch * p.key_heads, across + along, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across), values((last - first) * along);
    pack(kernels, k, keys.get(), v, values.get(), p.key_heads, first, last, p.key_mask ? &bits : nullptr, p.threads);
    const std::int64_t per_head = tiles.size(), per_key_head = per_head * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, outputs, scores;
        float most[kTileRows], total[kTileRows];
      };
      auto scratch = hold(kernels, Scratch{Floats(kTileRows * packing.words), Floats(kTileRows * summed.strips * 16),
                                           Floats(kTileRows * kernels.piece() * kPanel), {}, {}});
      return [&, scratch](std::int64_t item) {
        const std::int64_t key_head = first + item / per_key_head, batch = key_head / p.key_heads;
        const std::int64_t head = key_head % p.key_heads * p.group() + item % per_key_head / per_head;
        const Tiles::Tile& at = tiles[per_head - 1 - item % per_head];  // the longest first, where they are causal
        PanelList list(of_batch(bits, batch));
        columns_of(p, batch, head, at, false, list);
        if (kernels.matrices) list.pair();
        kernels.rows(q.vectors(batch, head), at.first, at.first + at.count, p.factor(), scratch->rows.get());
        const ForwardTile tile{scratch->rows.get(), at.count, p.of_queries(at.first), list.data(), list.size(),
                               {keys.get() + (key_head - first) * across, packing.words,
                                values.get() + (key_head - first) * along, summed.strips},
                               scratch->outputs.get(), scratch->most, scratch->total, scratch->scores.get(),
                               std::abs(p.factor())};
        kernels.forward(tile);
        auto* there = static_cast<char*>(outputs.head(batch, head)) + at.first * outputs.stride * outputs.bytes();
        kernels.finish(tile, v.size, outputs.value, there, outputs.stride,
                       lse + (batch * p.heads + head) * p.queries + at.first);
      };
    });
  });
}

// ------------------------------------------------------------------------------------------------ mass of blocks

// Shifts of weights from the log-sum-exp of rows: a row that sees nothing has no weights.
std::vector<float> shifts_of(const float* lse, std::int64_t count) {
  std::vector<float> shifts(static_cast<std::size_t>((count + 15) / 16 * 16), std::numeric_limits<float>::infinity());
  for (std::int64_t i = 0; i < count; ++i)
    if (lse[i] != -std::numeric_limits<float>::infinity()) shifts[static_cast<std::size_t>(i)] = lse[i] * kPerLog2;
  return shifts;
}

// Adds sums of columns to those of the blocks that hold them.
void add_columns(const Panel* panels, std::int64_t count, const float* sums, std::int64_t width, float* line) {
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t first = std::int64_t{kPanel} * panels[k].place;
    if (first / width == (first + kPanel - 1) / width) {
      float total = 0.0f;
      for (int lane = 0; lane < kPanel; ++lane) total += sums[16 * k + lane];
      line[first / width] += total;
    } else {
      for (int lane = 0; lane < kPanel; ++lane)
        if (panels[k].bits >> lane & 1u) line[(first + lane) / width] += sums[16 * k + lane];
    }
  }
}

void mass(const Problem& p, const Heads& q, const Heads& k, const float* lse, std::int64_t height, std::int64_t width,
          float* target) {
  const KeyBits bits = key_bits(p);
  const AttentionKernels& kernels = kernels_for(p, rounded(q) && rounded(k));
  const Packing packing(kernels, k.size);
  const std::int64_t panels = paired_panels(p.keys), across = panels * packing.across;
  const std::int64_t blocks = (p.queries + height - 1) / height, columns = (p.keys + width - 1) / width;
  in_rounds(p.batch * p.key_heads, across, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across);
    pack(kernels, k, keys.get(), k, nullptr, p.key_heads, first, last, nullptr, p.threads);
    const std::int64_t per_key_head = blocks * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, scores, sums;
      };
      auto scratch = hold(kernels, Scratch{Floats(kTileRows * packing.words), Floats(kTileRows * kPiece * kPanel),
                                           Floats(panels * kPanel)});
      return [&, scratch](std::int64_t item) {
        const std::int64_t key_head = first + item / per_key_head, batch = key_head / p.key_heads;
        const std::int64_t head = key_head % p.key_heads * p.group() + item % per_key_head / blocks;
        const std::int64_t block = blocks - 1 - item % blocks, begin = block * height;
        const Tiles tiles(std::min(height, p.queries - begin), height);
        const std::vector<float> shifts = shifts_of(lse + (batch * p.heads + head) * p.queries + begin,
                                                    std::min(height, p.queries - begin));
        float* line = target + ((batch * p.heads + head) * blocks + block) * columns;
        std::fill_n(line, columns, 0.0f);
        PanelList list(of_batch(bits, batch));
        for (std::int64_t i = 0; i < tiles.size(); ++i) {
          const Tiles::Tile at{begin + tiles[i].first, tiles[i].count, 0};
          columns_of(p, batch, head, at, false, list);
          if (kernels.matrices) list.pair();
          kernels.rows(q.vectors(batch, head), at.first, at.first + at.count, p.factor(), scratch->rows.get());
          std::fill_n(scratch->sums.get(), list.size() * kPanel, 0.0f);
          kernels.mass({scratch->rows.get(), at.count, p.of_queries(at.first), list.data(), list.size(),
                        keys.get() + (key_head - first) * across, packing.words, shifts.data() + tiles[i].first,
                        scratch->sums.get(), scratch->scores.get(), std::abs(p.factor())});
          add_columns(list.data(), list.size(), scratch->sums.get(), width, line);
        }
      };
    });
  });
}

// ------------------------------------------------------------------------------------------------ antidiagonals

// `stride` adjacent vectors as one, in reverse order if wanted, for folded vectors first … last − 1. Vectors that are
// masked or behind the last are zeros.
class Folded {
 public:
  Folded(const Vectors& from, std::int64_t stride, bool reversed, const std::uint8_t* mask, std::int64_t first,
         std::int64_t last)
      : count_(last - first), size_(stride * from.size), value_(from.value),
        numbers_(count_ * size_ * (value_ == Value::float32 ? 4 : 2) / 4 + 1) {
    const std::int64_t width = value_ == Value::float32 ? 4 : 2, bytes = from.size * width;
    auto* to = reinterpret_cast<char*>(numbers_.get());
    for (std::int64_t row = first; row < last; ++row)
      for (std::int64_t i = 0; i < stride; ++i, to += bytes) {
        const std::int64_t vector = row * stride + (reversed ? stride - 1 - i : i);
        if (vector < from.count && (!mask || mask[vector]))
          std::memcpy(to, static_cast<const char*>(from.data) + vector * from.stride * width,
                      static_cast<std::size_t>(bytes));
        else std::memset(to, 0, static_cast<std::size_t>(bytes));
      }
  }
  Vectors vectors() const { return {numbers_.get(), size_, count_, size_, value_}; }

 private:
  std::int64_t count_, size_;
  Value value_;
  Floats numbers_;
};

// Whether any of `stride` adjacent keys is real.
KeyBits folded_bits(const Problem& p, std::int64_t stride, std::int64_t folded) {
  KeyBits bits;
  for (std::int64_t b = 0; b < (p.key_mask ? p.batch : 1); ++b) {
    std::vector<std::uint8_t> some(static_cast<std::size_t>(folded), p.key_mask ? 0 : 1);
    if (p.key_mask)
      for (std::int64_t key = 0; key < p.keys; ++key)
        some[static_cast<std::size_t>(key / stride)] |= p.key_mask[b * p.keys + key];
    bits.push_back(real_keys(some.data(), folded));
  }
  return bits;
}

// p describes queries and keys; its offset is that of folded rows and columns.
void antidiagonal(const Problem& p, const Heads& q, const Heads& k, std::int64_t stride, std::int64_t block,
                  float* target) {
  const std::int64_t rows = (p.queries + stride - 1) / stride, folded = (p.keys + stride - 1) / stride;
  const std::int64_t height = block / stride;
  const AttentionKernels& kernels = kernels_for(p, rounded(q) && rounded(k));
  const Packing packing(kernels, stride * k.size);
  const std::int64_t panels = paired_panels(folded), across = panels * packing.across;
  const std::int64_t blocks = (p.queries + block - 1) / block, columns = (p.keys + block - 1) / block;
  const std::int64_t together = std::max<std::int64_t>(kTileRows / height, 1);
  const std::int64_t tiles = (blocks + together - 1) / together;
  const float factor = p.factor() / static_cast<float>(stride);
  const KeyBits bits = folded_bits(p, stride, folded);
  const bool side_by_side = k.stride == k.size && !p.key_mask && p.keys % stride == 0;  // folded as they lie
  in_rounds(p.batch * p.key_heads, across, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across);
    share_items((last - first) * panels, p.threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t head = first + item / panels, place = item % panels, batch = head / p.key_heads;
        const Vectors all = k.vectors(batch, head % p.key_heads);
        float* to = keys.get() + ((head - first) * panels + place) * packing.across;
        if (side_by_side) {
          kernels.across({all.data, stride * k.size, folded, stride * k.size, k.value}, place, place + 1, to);
          return;
        }
        const Folded panel(all, stride, false, p.key_mask ? p.key_mask + batch * p.keys : nullptr, place * kPanel,
                           (place + 1) * kPanel);
        kernels.across(panel.vectors(), 0, 1, to);
      };
    });
    const std::int64_t per_key_head = tiles * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, scores, sums;
      };
      const std::int64_t most = (together * height + 31) / 32 * 32;
      auto scratch = hold(kernels, Scratch{Floats(most * packing.words), Floats(most * panels * kPanel),
                                           Floats(together * panels * kPanel)});
      return [&, scratch](std::int64_t item) {
        const std::int64_t key_head = first + item / per_key_head, batch = key_head / p.key_heads;
        const std::int64_t head = key_head % p.key_heads * p.group() + item % per_key_head / tiles;
        const std::int64_t begin = (tiles - 1 - item % tiles) * together, end = std::min(begin + together, blocks);
        const std::int64_t low = begin * height, high = std::min(end * height, rows);
        const Band band{-kFar, p.causal ? low + p.offset + 1 : kFar};
        PanelList list(of_batch(bits, batch));
        list.add(0, std::min(folded, band.high + high - low - 1));
        if (kernels.matrices) list.pair();
        const Folded folded_rows(q.vectors(batch, head), stride, true, nullptr, low, high);
        kernels.rows(folded_rows.vectors(), 0, high - low, factor, scratch->rows.get());
        kernels.strip({scratch->rows.get(), static_cast<int>(high - low), band, list.data(), list.size(),
                       keys.get() + (key_head - first) * across, packing.words, static_cast<int>(height),
                       scratch->sums.get(), scratch->scores.get(), std::abs(factor)});
        float* lines = target + ((batch * p.heads + head) * blocks + begin) * columns;
        std::fill_n(lines, (end - begin) * columns, 0.0f);
        for (std::int64_t line = 0; line < end - begin; ++line)
          add_columns(list.data(), list.size(), scratch->sums.get() + line * list.size() * kPanel, height,
                      lines + line * columns);
      };
    });
  });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", [](const nb::tuple& problem, const nb::tuple& q, const nb::tuple& k, const nb::tuple& v,
                                const nb::tuple& outputs, Address lse) {
    const Problem p = Problem::from(problem);
    const Heads all[] = {Heads::from(q), Heads::from(k), Heads::from(v), Heads::from(outputs)};
    const nb::gil_scoped_release unlocked;
    forward(p, all[0], all[1], all[2], all[3], reinterpret_cast<float*>(lse));
  });
  m.def("attention_block_mass", [](const nb::tuple& problem, const nb::tuple& q, const nb::tuple& k, Address lse,
                                   std::int64_t height,
                                   std::int64_t width, Address target) {
    const Problem p = Problem::from(problem);
    const Heads all[] = {Heads::from(q), Heads::from(k)};
    const nb::gil_scoped_release unlocked;
    mass(p, all[0], all[1], reinterpret_cast<const float*>(lse), height, width, reinterpret_cast<float*>(target));
  });
  m.def("attention_antidiagonal_mass", [](const nb::tuple& problem, const nb::tuple& q, const nb::tuple& k,
                                          std::int64_t stride,
                                          std::int64_t block, Address target) {
    const Problem p = Problem::from(problem);
    const Heads all[] = {Heads::from(q), Heads::from(k)};
    const nb::gil_scoped_release unlocked;
    antidiagonal(p, all[0], all[1], stride, block, reinterpret_cast<float*>(target));
  });
}

}  // namespace gossamer
