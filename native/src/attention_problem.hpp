// Attention as Python describes it, and how it is cut into tiles.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention_tiles.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace gossamer {

using Address = std::uintptr_t;

constexpr std::int64_t kFar = std::int64_t{1} << 40;  // a position behind all others
constexpr float kPerLog2 = 1.44269504089f;

// Memory that is written before it is read.
class Floats {
 public:
  explicit Floats(std::int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>((count * 4 + 127) / 64 * 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;
};

// A tensor (batch, heads, length, size) whose numbers of a vector are adjacent.
struct Heads {
  Address data;
  std::int64_t batch_stride, head_stride, stride;
  std::int64_t length, size;
  Value value;

  // (address, three strides, length, size, value)
  static Heads from(const nanobind::tuple& given) {
    const auto number = [&](int i) { return nanobind::cast<std::int64_t>(given[static_cast<std::size_t>(i)]); };
    return {nanobind::cast<Address>(given[0]), number(1), number(2), number(3), number(4), number(5),
            static_cast<Value>(nanobind::cast<int>(given[6]))};
  }
  std::int64_t bytes() const { return value == Value::float32 ? 4 : 2; }
  std::int64_t panels() const { return (length + kPanel - 1) / kPanel; }
  std::int64_t strips() const { return (size + 15) / 16; }
  void* head(std::int64_t batch, std::int64_t head) const {
    return reinterpret_cast<void*>(
        data + static_cast<Address>((batch * batch_stride + head * head_stride) * bytes()));
  }
  Vectors vectors(std::int64_t batch, std::int64_t one) const {
    return {head(batch, one), stride, length, size, value};
  }
};

// Which blocks are read: (batch | 1, heads | 1, rows, columns) bytes. Without them, everything is one block.
struct Blocks {
  const std::uint8_t* kept;
  std::int64_t batch_stride, head_stride, columns;
  std::int64_t height, width;  // queries and keys of a block
};

struct Problem {
  std::int64_t batch, heads, key_heads;
  std::int64_t queries, keys;
  std::int64_t offset;  // the key that the first query meets
  bool causal;
  std::int64_t window;  // 0: none
  Blocks blocks;
  const std::uint8_t* key_mask;  // (batch, keys), or null
  float scale;
  int threads;

  // (batch, heads, key heads, queries, keys, offset, causal, window, blocks, their two strides, height, width, key
  // mask,   // scale, threads)
  static Problem from(const nanobind::tuple& given) {
    const auto number = [&](int i) { return nanobind::cast<std::int64_t>(given[static_cast<std::size_t>(i)]); };
    const auto address = [&](int i) { return nanobind::cast<Address>(given[static_cast<std::size_t>(i)]); };
    Problem p{number(0), number(1), number(2), number(3), number(4), number(5), number(6) != 0, number(7), {}, nullptr,
              0, 1};
    p.blocks = {reinterpret_cast<const std::uint8_t*>(address(8)), number(9), number(10), 0, number(11), number(12)};
    if (!p.blocks.kept) {
      p.blocks.height = std::max<std::int64_t>(p.queries, 1);
      p.blocks.width = std::max<std::int64_t>(p.keys, 1);
    }
    p.blocks.columns = (p.keys + p.blocks.width - 1) / p.blocks.width;
    p.key_mask = reinterpret_cast<const std::uint8_t*>(address(13));
    p.scale = nanobind::cast<float>(given[14]);
    p.threads = std::max(nanobind::cast<int>(given[15]), 1);
    return p;
  }

  std::int64_t group() const { return heads / key_heads; }
  float factor() const { return scale * kPerLog2; }  // from products to exponents of two

  // What queries from `first` on see of the keys, and what keys from `first` on see of the queries.
  Band of_queries(std::int64_t first) const {
    const std::int64_t at = first + offset;
    return {window ? at - window + 1 : -kFar, causal ? at + 1 : window ? at + window : kFar};
  }
  Band of_keys(std::int64_t first) const {
    const std::int64_t at = first - offset;
    return {causal ? at : window ? at - window + 1 : -kFar, window ? at + window : kFar};
  }
};

// A bit for each key of a panel that is real; behind the last there are none.
inline std::vector<std::uint16_t> real_keys(const std::uint8_t* mask, std::int64_t keys) {
  std::vector<std::uint16_t> bits(static_cast<std::size_t>((keys + kPanel - 1) / kPanel), 0xffff);
  if (keys % kPanel) bits.back() = static_cast<std::uint16_t>((1u << keys % kPanel) - 1u);
  if (mask)
    for (std::int64_t key = 0; key < keys; ++key)
      if (!mask[key]) bits[static_cast<std::size_t>(key / kPanel)] &= static_cast<std::uint16_t>(~(1u << key % kPanel));
  return bits;
}

// Panels of columns that a tile reads, ascending.
class PanelList {
 public:
  explicit PanelList(const std::vector<std::uint16_t>& real) : real_(real) {}

  void clear() { panels_.clear(); }
  // The columns first … last − 1, which follow those added before.
  void add(std::int64_t first, std::int64_t last) {
    for (std::int64_t place = first / kPanel; place * kPanel < last; ++place) {
      const std::int64_t low = std::max<std::int64_t>(first - place * kPanel, 0);
      const std::int64_t high = std::min<std::int64_t>(last - place * kPanel, kPanel);
      const std::uint32_t bits = ((1u << high) - (1u << low)) & real_[static_cast<std::size_t>(place)];
      if (!bits) continue;
      if (!panels_.empty() && panels_.back().place == place) panels_.back().bits |= bits;
      else panels_.push_back({static_cast<std::int32_t>(place), bits});
    }
  }
  // As kernels for matrix registers read them: every panel with its neighbour, or with itself without bits.
  void pair() {
    std::vector<Panel> pairs;
    pairs.reserve(2 * panels_.size());
    for (std::size_t i = 0; i < panels_.size(); ++i) {
      const Panel& one = panels_[i];
      const bool both = one.place % 2 == 0 && i + 1 < panels_.size() && panels_[i + 1].place == one.place + 1;
      pairs.push_back(one);
      pairs.push_back(both ? panels_[++i] : Panel{one.place, 0});
    }
    panels_.swap(pairs);
  }
  const Panel* data() const { return panels_.data(); }
  std::int64_t size() const { return static_cast<std::int64_t>(panels_.size()); }

 private:
  const std::vector<std::uint16_t>& real_;
  std::vector<Panel> panels_;
};

// Lengths cut into blocks, and blocks into tiles.
class Tiles {
 public:
  struct Tile {
    std::int64_t first;
    int count;
    std::int64_t block;
  };

  Tiles(std::int64_t length, std::int64_t block) {
    const std::int64_t parts = (std::min(block, length) + kTileRows - 1) / kTileRows;
    const std::int64_t rows = block >= length ? kTileRows : ((block + parts - 1) / parts + 7) / 8 * 8;
    for (std::int64_t begin = 0; begin < length; begin += block)
      for (std::int64_t first = begin; first < std::min(begin + block, length); first += rows)
        tiles_.push_back({first, static_cast<int>(std::min({rows, begin + block - first, length - first})),
                          begin / block});
  }
  std::int64_t size() const { return static_cast<std::int64_t>(tiles_.size()); }
  const Tile& operator[](std::int64_t i) const { return tiles_[static_cast<std::size_t>(i)]; }

 private:
  std::vector<Tile> tiles_;
};

// The keys that queries of a tile read, or the queries that read its keys.
inline void columns_of(const Problem& p, std::int64_t batch, std::int64_t head, const Tiles::Tile& tile, bool of_keys,
                       PanelList& list) {
  const Band band = of_keys ? p.of_keys(tile.first) : p.of_queries(tile.first);
  const std::int64_t low = std::max<std::int64_t>(band.low, 0);
  const std::int64_t high = std::min(of_keys ? p.queries : p.keys, band.high + tile.count - 1);
  const std::int64_t size = of_keys ? p.blocks.height : p.blocks.width;
  list.clear();
  if (low >= high) return;
  const std::uint8_t* kept = p.blocks.kept;
  if (kept) {
    kept += batch * p.blocks.batch_stride + head * p.blocks.head_stride;
    kept += of_keys ? tile.block : tile.block * p.blocks.columns;
  }
  const std::int64_t step = of_keys ? p.blocks.columns : 1;
  for (std::int64_t block = low / size; block * size < high; ++block)
    if (!kept || kept[block * step]) list.add(std::max(low, block * size), std::min(high, (block + 1) * size));
}

// body(thread_number, item) for all items, of which every thread takes the next when it has done one.
template <typename Setup>
void share_items(std::int64_t items, int threads, Setup&& setup) {
  std::atomic<std::int64_t> next{0};
  const int parts = static_cast<int>(std::clamp<std::int64_t>(items, 1, threads));
  parallel(parts, [&](int, int) {
    auto work = setup();
    for (std::int64_t item = next++; item < items; item = next++) work(item);
  });
}

}  // namespace gossamer
