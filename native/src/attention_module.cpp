// Attention as Python calls it: heads are packed a few at a time, and their tiles divided among threads.
//
// gossamer.kernels.attention checks shapes and dtypes before; nothing here can.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "attention_packs.hpp"
#include "attention_problem.hpp"
#include "cpu.hpp"

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

// ------------------------------------------------------------------------------------------------ forward

void forward(const Problem& p, const Heads& q, const Heads& k, const Heads& v, const Heads& outputs, float* lse) {
  const KeyBits bits = key_bits(p);
  const Tiles tiles(p.queries, p.blocks.height);
  const std::int64_t across = k.panels() * kPanel * k.size, along = v.panels() * 256 * v.strips();
  in_rounds(p.batch * p.key_heads, across + along, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across), values((last - first) * along);
    pack(k, keys.get(), v, values.get(), p.key_heads, first, last, p.key_mask ? &bits : nullptr, p.threads);
    const std::int64_t per_head = tiles.size(), per_key_head = per_head * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, outputs, scores;
        float most[kTileRows], total[kTileRows];
      };
      auto scratch = std::make_shared<Scratch>(
          Scratch{Floats(kTileRows * q.size), Floats(kTileRows * v.strips() * 16), Floats(kTileRows * kPiece * kPanel),
                  {}, {}});
      return [&, scratch](std::int64_t item) {
        const std::int64_t key_head = first + item / per_key_head, batch = key_head / p.key_heads;
        const std::int64_t head = key_head % p.key_heads * p.group() + item % per_key_head / per_head;
        const Tiles::Tile& at = tiles[per_head - 1 - item % per_head];  // the longest first, where they are causal
        PanelList list(of_batch(bits, batch));
        columns_of(p, batch, head, at, false, list);
        attention_kernels().rows(q.vectors(batch, head), at.first, at.first + at.count, p.scale * kPerLog2,
                                 scratch->rows.get());
        const ForwardTile tile{scratch->rows.get(), at.count, p.of_queries(at.first), list.data(), list.size(),
                               {keys.get() + (key_head - first) * across, k.size,
                                values.get() + (key_head - first) * along, v.strips()},
                               scratch->outputs.get(), scratch->most, scratch->total, scratch->scores.get()};
        attention_kernels().forward(tile);
        auto* there = static_cast<char*>(outputs.head(batch, head)) + at.first * outputs.stride * outputs.bytes();
        attention_kernels().finish(tile, v.size, outputs.value, there, outputs.stride,
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
  const std::int64_t across = k.panels() * kPanel * k.size;
  const std::int64_t blocks = (p.queries + height - 1) / height, columns = (p.keys + width - 1) / width;
  in_rounds(p.batch * p.key_heads, across, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across);
    pack(k, keys.get(), k, nullptr, p.key_heads, first, last, nullptr, p.threads);
    const std::int64_t per_key_head = blocks * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, scores, sums;
      };
      auto scratch = std::make_shared<Scratch>(
          Scratch{Floats(kTileRows * q.size), Floats(kTileRows * kPiece * kPanel), Floats(k.panels() * kPanel)});
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
          attention_kernels().rows(q.vectors(batch, head), at.first, at.first + at.count, p.scale * kPerLog2,
                                   scratch->rows.get());
          std::fill_n(scratch->sums.get(), list.size() * kPanel, 0.0f);
          attention_kernels().mass({scratch->rows.get(), at.count, p.of_queries(at.first), list.data(), list.size(),
                                    keys.get() + (key_head - first) * across, k.size, shifts.data() + tiles[i].first,
                                    scratch->sums.get(), scratch->scores.get()});
          add_columns(list.data(), list.size(), scratch->sums.get(), width, line);
        }
      };
    });
  });
}

// ------------------------------------------------------------------------------------------------ antidiagonals

// `stride` adjacent vectors as one, zeros where a vector is masked or behind the last. Panels of them across.
void fold_across(const Vectors& from, std::int64_t stride, const std::uint8_t* mask, std::int64_t first,
                 std::int64_t last, float* target) {
  const std::int64_t size = stride * from.size;
  const Floats panel(kPanel * size);
  for (std::int64_t place = first; place < last; ++place, target += size * kPanel) {
    for (std::int64_t i = 0; i < kPanel * stride; ++i) {
      const std::int64_t vector = place * kPanel * stride + i;
      float* to = panel.get() + i * from.size;
      if (vector < from.count && (!mask || mask[vector])) attention_kernels().rows(from, vector, vector + 1, 1.0f, to);
      else std::fill_n(to, from.size, 0.0f);
    }
    attention_kernels().across({panel.get(), size, kPanel, size, Value::float32}, 0, 1, target);
  }
}

// Folded rows first … last − 1, whose vectors lie in reverse order.
void fold_rows(const Vectors& from, std::int64_t stride, float factor, std::int64_t first, std::int64_t last,
               float* target) {
  for (std::int64_t row = first; row < last; ++row)
    for (std::int64_t i = stride - 1; i >= 0; --i, target += from.size) {
      const std::int64_t vector = row * stride + i;
      if (vector < from.count) attention_kernels().rows(from, vector, vector + 1, factor, target);
      else std::fill_n(target, from.size, 0.0f);
    }
}

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
  const std::int64_t panels = (folded + kPanel - 1) / kPanel, size = stride * k.size, across = panels * kPanel * size;
  const std::int64_t blocks = (p.queries + block - 1) / block, columns = (p.keys + block - 1) / block;
  const std::int64_t together = std::max<std::int64_t>(kTileRows / height, 1);
  const std::int64_t tiles = (blocks + together - 1) / together;
  const KeyBits bits = folded_bits(p, stride, folded);
  in_rounds(p.batch * p.key_heads, across, [&](std::int64_t first, std::int64_t last) {
    const Floats keys((last - first) * across);
    share_items((last - first) * panels, p.threads, [&] {
      return [&](std::int64_t item) {
        const std::int64_t head = first + item / panels, place = item % panels, batch = head / p.key_heads;
        fold_across(k.vectors(batch, head % p.key_heads), stride, p.key_mask ? p.key_mask + batch * p.keys : nullptr,
                    place, place + 1,
                    keys.get() + ((head - first) * panels + place) * kPanel * size);
      };
    });
    const std::int64_t per_key_head = tiles * p.group();
    share_items((last - first) * per_key_head, p.threads, [&] {
      struct Scratch {
        Floats rows, scores, sums;
      };
      auto scratch = std::make_shared<Scratch>(Scratch{Floats(together * height * size),
                                                       Floats(together * height * panels * kPanel),
                                                       Floats(together * panels * kPanel)});
      return [&, scratch](std::int64_t item) {
        const std::int64_t key_head = first + item / per_key_head, batch = key_head / p.key_heads;
        const std::int64_t head = key_head % p.key_heads * p.group() + item % per_key_head / tiles;
        const std::int64_t begin = (tiles - 1 - item % tiles) * together, end = std::min(begin + together, blocks);
        const std::int64_t low = begin * height, high = std::min(end * height, rows);
        const Band band{-kFar, p.causal ? low + p.offset + 1 : kFar};
        PanelList list(of_batch(bits, batch));
        list.add(0, std::min(folded, band.high + high - low - 1));
        fold_rows(q.vectors(batch, head), stride, p.scale / static_cast<float>(stride) * kPerLog2, low, high,
                  scratch->rows.get());
        attention_kernels().strip({scratch->rows.get(), static_cast<int>(high - low), band, list.data(), list.size(),
                                   keys.get() + (key_head - first) * across, size, static_cast<int>(height),
                                   scratch->sums.get(),
                                   scratch->scores.get()});
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
