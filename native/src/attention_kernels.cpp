// Attention of tiles, forward and backward, with an online softmax.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library.

#include "attention_tiles.hpp"

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

#include "lanes.hpp"

#include "attention_lanes.hpp"

template <int Value>
struct Count {
  static constexpr int value = Value;
};

#include "attention_vectors.hpp"

#include "attention_packing.hpp"
#include "attention_products.hpp"
#include "attention_softmax.hpp"

constexpr float kLog2 = 0.69314718056f;

void forward(const ForwardTile& tile) {
  __builtin_memset(tile.outputs, 0, sizeof(float) * static_cast<std::size_t>(tile.count * tile.columns.strips * 16));
  float shares[kTileRows];
  for (int row = 0; row < tile.count; ++row) tile.most[row] = negative_infinity(), tile.total[row] = 0.0f;
  in_pieces<kPiece>(tile.panels, tile.panel_count, tile.band, tile.count, [&](const Piece& piece) {
    const Panel* panels = piece.panels;
    const int count = piece.count;
    all_scores(tile.rows, tile.count, tile.columns.size, tile.band, panels, count, tile.columns.across,
               piece.along(tile.columns), tile.scores, kStride);
    in_rows(tile.count, [&](int first, auto some) {
      constexpr int kSome = decltype(some)::value;
      const int seen = seen_by(tile.band, first + kSome - 1, panels, count);
      for (int row = first; row < first + kSome; ++row) {
        float* scores = tile.scores + row * kStride;
        hide(scores, panels, piece.open, seen, tile.band, row);
        const float before = tile.most[row], found = highest(scores, seen), most = found > before ? found : before;
        shares[row] = power_of_two(before - finite(most));
        tile.total[row] = tile.total[row] * shares[row] + exponentials(scores, seen, 1.0f, finite(most));
        tile.most[row] = most;
      }
    });
    all_sums(tile.scores, kStride, tile.count, tile.band, panels, count, tile.columns.along, tile.columns.strips,
             piece.next_across(tile.columns), shares, tile.outputs);
  });
}

void finish(const ForwardTile& tile, std::int64_t size, Value value, void* outputs, std::int64_t stride, float* lse) {
  for (int row = 0; row < tile.count; ++row) {
    const float total = tile.total[row];
    const float* from = tile.outputs + row * tile.columns.strips * 16;
    write_row(from, size, total == 0.0f ? 0.0f : 1.0f / total, value, outputs, row * stride);
    if (lse) lse[row] = total == 0.0f ? negative_infinity() : tile.most[row] * kLog2 + __builtin_logf(total);
  }
}

void mass(const MassTile& tile) {
  float* sums = tile.sums;
  in_pieces<kPiece>(tile.panels, tile.panel_count, tile.band, tile.count, [&](const Piece& piece) {
    const Panel* panels = piece.panels;
    const int count = piece.count;
    all_scores(tile.rows, tile.count, tile.size, tile.band, panels, count, tile.across,
               piece.next_across({tile.across, tile.size, nullptr, 0}), tile.scores, kStride);
    in_rows(tile.count, [&](int first, auto some) {
      constexpr int kSome = decltype(some)::value;
      const int seen = seen_by(tile.band, first + kSome - 1, panels, count);
      for (int row = first; row < first + kSome; ++row) {
        float* scores = tile.scores + row * kStride;
        hide(scores, panels, piece.open, seen, tile.band, row);
        const Lanes shift = spread(tile.shifts[row]);
        for (int k = 0; k < seen; ++k)
          store(sums + 16 * k, add(load(sums + 16 * k), power_of_two(subtract(load(scores + 16 * k), shift))));
      }
    });
    sums += 16 * count;
  });
}

void strip(const StripTile& tile) {
  const int count = static_cast<int>(tile.panel_count);
  const std::int64_t stride = 16 * tile.panel_count;
  const std::int64_t lines = (tile.count + tile.height - 1) / tile.height;
  __builtin_memset(tile.sums, 0, sizeof(float) * static_cast<std::size_t>(lines * stride));
  if (!count) return;
  const int open = open_to_all(tile.panels, count, tile.band, tile.count);
  const Coming next{tile.panels + kWide, count - kWide, tile.across, tile.size * kPanel};
  all_scores(tile.rows, tile.count, tile.size, tile.band, tile.panels, count, tile.across, next, tile.scores, stride);
  for (int row = 0; row < tile.count; ++row)
    add_share(tile, row, open, seen_by(tile.band, row, tile.panels, count), 1.0f);
}

// From a row's scores and products to weights and flow, in place.
inline void weigh(const GradientTile& tile, float* scores, float* products, const Panel* panels, int open, int count,
                  int row) {
  for (int k = 0; k < count; ++k) {
    const std::int64_t column = std::int64_t{kPanel} * panels[k].place;
    const Lanes shift = tile.by_column ? load(tile.shifts + column) : spread(tile.shifts[row]);
    const Lanes delta = tile.by_column ? load(tile.deltas + column) : spread(tile.deltas[row]);
    Lanes weight = power_of_two(subtract(load(scores + 16 * k), shift));
    Lanes flow = multiply(weight, subtract(load(products + 16 * k), delta));
    if (k >= open) {
      const std::uint32_t bits = visible(panels[k], tile.band, row);
      if (bits != 0xffffu) weight = choose(bits, weight, 0.0f), flow = choose(bits, flow, 0.0f);
    }
    store(scores + 16 * k, weight);
    store(products + 16 * k, flow);
  }
}

void gradient(const GradientTile& tile) {
  float* products = tile.scores + kTileRows * kStride;
  in_pieces<kPiece>(tile.panels, tile.panel_count, tile.band, tile.count, [&](const Piece& piece) {
    const Panel* panels = piece.panels;
    const int count = piece.count;
    all_scores(tile.rows, tile.count, tile.first.size, tile.band, panels, count, tile.first.across,
               piece.across(tile.second), tile.scores, kStride);
    all_scores(tile.grads, tile.count, tile.second.size, tile.band, panels, count, tile.second.across,
               piece.along(tile.first), products, kStride);
    in_rows(tile.count, [&](int first, auto some) {
      constexpr int kSome = decltype(some)::value;
      const int seen = seen_by(tile.band, first + kSome - 1, panels, count);
      for (int row = first; row < first + kSome; ++row)
        weigh(tile, tile.scores + row * kStride, products + row * kStride, panels, piece.open, seen, row);
    });
    if (tile.weight_sums)
      all_sums(tile.scores, kStride, tile.count, tile.band, panels, count, tile.second.along, tile.second.strips,
               piece.next_across(tile.second), nullptr, tile.weight_sums);
    all_sums(products, kStride, tile.count, tile.band, panels, count, tile.first.along, tile.first.strips,
             piece.next_across(tile.first), nullptr, tile.flow_sums);
  });
}

}  // namespace

const AttentionKernels& attention_table() {
  static const AttentionKernels kernels = {rows_any, across_any, along_any, forward, mass, strip, gradient, finish,
                                           write,    false};
  return kernels;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
