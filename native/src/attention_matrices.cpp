// Attention of tiles by the matrix registers of a processor (AMX), from numbers of bfloat16.
//
// Scores are sums of exact products in float32. Weights are rounded to bfloat16 where they meet the values, whose sums
// are in float32 again. Compiled with instructions that few processors have, and called only where
// `matrix_registers_usable` says so; it must not use anything from the standard library.

#include "attention_tiles.hpp"

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace gossamer {

#if defined(__AMX_BF16__)

namespace {

#include "lanes.hpp"

#include "attention_lanes.hpp"

template <int Value>
struct Count {
  static constexpr int value = Value;
};

#include "attention_vectors.hpp"

#include "attention_products.hpp"
#include "attention_softmax.hpp"

constexpr int kGroup = 32;               // rows, and numbers of a vector, that two registers or one hold
constexpr std::int64_t kRegister = 256;  // words: sixteen rows of sixteen
constexpr std::int64_t kWideStride = kMatrixPiece * kPanel;  // scores of a row that is multiplied with values

// ------------------------------------------------------------------------------------------------ packing

// 32 numbers of a vector from number `i` on, zeros behind its end.
inline __m512i numbers(const Vectors& from, std::int64_t vector, std::int64_t i) {
  const std::int64_t left = from.size - i;
  const __mmask32 there = left >= kGroup ? ~__mmask32{0} : (__mmask32{1} << left) - 1u;
  return _mm512_maskz_loadu_epi16(there, static_cast<const std::uint16_t*>(from.data) + vector * from.stride + i);
}

// Sixteen of them, each in a word.
inline __m512i wide_numbers(const Vectors& from, std::int64_t vector, std::int64_t i) {
  const std::int64_t left = from.size - i;
  const auto there = static_cast<__mmask16>(left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1u : 0u);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
      there, static_cast<const std::uint16_t*>(from.data) + vector * from.stride + i));
}

// Registers of sixteen rows × 32 numbers: strip of rows × chunk of numbers.
void pack_rows(const Vectors& from, std::int64_t first, std::int64_t last, float factor, float* target) {
  const __m512i sign = _mm512_set1_epi16(static_cast<short>(factor < 0 ? 0x8000 : 0));
  const std::int64_t chunks = (from.size + kGroup - 1) / kGroup;
  for (std::int64_t row = 0; first + row < last || row % kGroup; ++row) {
    float* strip = target + row / 16 * chunks * kRegister + row % 16 * 16;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const bool there = first + row < last;
      const __m512i some = there ? numbers(from, first + row, kGroup * chunk) : _mm512_setzero_si512();
      _mm512_storeu_si512(strip + chunk * kRegister, _mm512_xor_si512(some, sign));
    }
  }
}

// Registers of sixteen pairs of numbers × sixteen vectors: panel × chunk of numbers.
void pack_across(const Vectors& from, std::int64_t first, std::int64_t last, float* target) {
  for (std::int64_t panel = first; panel < last; ++panel)
    for (std::int64_t i = 0; i < from.size; i += kGroup, target += kRegister) {
      Lanes block[16];
      for (int c = 0; c < 16; ++c) {
        const std::int64_t vector = panel * kPanel + c;
        block[c] = vector < from.count ? Lanes{_mm512_castsi512_ps(numbers(from, vector, i))} : zero();
      }
      transpose(block);
      for (int pair = 0; pair < 16; ++pair) store(target + 16 * pair, block[pair]);
    }
}

// Registers of sixteen pairs of vectors × sixteen numbers: pair of panels × strip of numbers.
void pack_along(const Vectors& from, std::int64_t first, std::int64_t last, const std::uint16_t* bits, float* target) {
  const std::int64_t strips = (from.size + kGroup - 1) / kGroup * 2;
  const auto words = [&](std::int64_t vector, std::int64_t strip) {
    const bool there = vector < from.count && (!bits || (bits[vector / kPanel] >> vector % kPanel & 1u));
    return there ? wide_numbers(from, vector, 16 * strip) : _mm512_setzero_si512();
  };
  for (std::int64_t panels = first; panels < last; panels += 2, target += strips * kRegister)
    for (std::int64_t pair = 0; pair < 16; ++pair)
      for (std::int64_t strip = 0; strip < strips; ++strip) {
        const std::int64_t vector = panels * kPanel + 2 * pair;
        const __m512i upper = _mm512_slli_epi32(words(vector + 1, strip), 16);
        _mm512_storeu_si512(target + strip * kRegister + 16 * pair, _mm512_or_si512(words(vector, strip), upper));
      }
}

// ------------------------------------------------------------------------------------------------ products

// What was written before is in memory when registers are read: the intrinsics do not say that they read it.
inline void settle() { __asm__ volatile("" : : : "memory"); }

// How many of the first panels some row of a group sees, and the neighbours of those.
inline int pairs_seen(const Band& band, int last, const Panel* panels, int count) {
  return (seen_by(band, last, panels, count) + 1) / 2 * 2;
}

// Calls body(first row, row behind the last, panels seen) for groups of rows that see any.
template <typename Body>
inline void in_groups(int rows, const Band& band, const Panel* panels, int count, Body&& body) {
  for (int first = 0; first < rows; first += kGroup) {
    const int end = first + kGroup < rows ? first + kGroup : rows;
    const int seen = pairs_seen(band, end - 1, panels, count);
    if (seen) body(first, end, seen);
  }
}

// Asks for words that are read soon, sixteen to a cache line.
inline void ask_for(const float* words, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += 16) __builtin_prefetch(words + i, 0, 2);
}

// Products of 32 rows with the columns of two panels; asks for another one.
inline void score_pair(const float* rows, std::int64_t chunks, const float* left, const float* right, const float* next,
                       float* scores, std::int64_t stride) {
  const float* lower = rows + chunks * kRegister;
  const std::int64_t line = 4 * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t at = 0; at < chunks * kRegister; at += kRegister) {
    ask_for(next + at, kRegister);
    _tile_loadd(4, rows + at, 64);
    _tile_loadd(6, left + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + at, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, line);
  _tile_stored(1, scores + 16, line);
  _tile_stored(2, scores + 16 * stride, line);
  _tile_stored(3, scores + 16 * stride + 16, line);
}

// Products of all rows with some panels. What no row of a group sees is left as it was.
inline void score_panels(const float* rows, int count, std::int64_t words, const Band& band, const Panel* panels,
                         int panel_count, const float* across, float* scores, std::int64_t stride) {
  const std::int64_t chunks = words / 16, size = words * kPanel;
  settle();
  for (int k = 0; k < panel_count; k += 2) {
    const float* left = across + panels[k].place * size;
    const float* right = across + panels[k + 1].place * size;
    const Panel* next = panels + (k + 2 < panel_count ? k + 2 : k);
    in_groups(count, band, panels + k, 2, [&](int first, int, int) {
      score_pair(rows + first * words, chunks, left, right, across + next[first / kGroup % 2].place * size,
                 scores + first * stride + k * kPanel, stride);
    });
  }
}

// Two registers of values, of which only one of the two panels is read.
struct Alone {
  alignas(64) float words[2 * kRegister] = {};

  const float* read(const float* values) {
    for (int strip = 0; strip < 2; ++strip)
      __builtin_memcpy(words + strip * kRegister, values + strip * kRegister, 4 * kRegister / 2);
    return words;
  }
};

// outputs += weights · values, for 32 rows; weights of a row lie in pairs from the start of its scores on.
inline void add_values(const float* weights, std::int64_t stride, const Panel* panels, int count, const float* along,
                       std::int64_t strips, float* outputs) {
  const std::int64_t weight_line = 4 * stride, line = 64 * strips;
  Alone alone;
  settle();
  for (std::int64_t strip = 0; strip < strips; strip += 2) {
    float* upper = outputs + 16 * strip;
    float* lower = upper + 16 * 16 * strips;
    _tile_loadd(0, upper, line);
    _tile_loadd(1, upper + 16, line);
    _tile_loadd(2, lower, line);
    _tile_loadd(3, lower + 16, line);
    for (int k = 0; k < count; k += 2) {
      const float* values = along + (panels[k].place / 2 * strips + strip) * kRegister;
      if (panels[k].place == panels[k + 1].place) {
        values = alone.read(values + panels[k].place % 2 * kRegister / 2);
        settle();
      }
      _tile_loadd(4, weights + 8 * k, weight_line);
      _tile_loadd(6, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + kRegister, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, weights + 16 * stride + 8 * k, weight_line);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, upper, line);
    _tile_stored(1, upper + 16, line);
    _tile_stored(2, lower, line);
    _tile_stored(3, lower + 16, line);
  }
}

// ------------------------------------------------------------------------------------------------ tiles

// 2^(factor · scores − shift), rounded to bfloat16 and in pairs, over the scores; returns the sum before rounding.
inline float weigh(float* scores, int count, float factor, float shift) {
  const Lanes factors = spread(factor), shifts = spread(-shift);
  Lanes totals[2] = {zero(), zero()};
  for (int k = 0; k < count; k += 2) {
    Lanes pair[2];
    for (int half = 0; half < 2; ++half) {
      pair[half] = power_of_two(multiply_add(load(scores + 16 * (k + half)), factors, shifts));
      totals[half] = add(totals[half], pair[half]);
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(pair[1].r, pair[0].r);
    __builtin_memcpy(scores + 8 * k, &rounded, 64);
  }
  return sum(add(totals[0], totals[1]));
}

inline void scale_row(float* outputs, std::int64_t strips, float share) {
  if (share == 1.0f) return;
  for (std::int64_t strip = 0; strip < strips; ++strip)
    store(outputs + 16 * strip, multiply(load(outputs + 16 * strip), spread(share)));
}

void forward(const ForwardTile& tile) {
  const std::int64_t width = 16 * tile.columns.strips, panel = kRegister / 2 * tile.columns.strips;
  const std::int64_t rows = (tile.count + kGroup - 1) / kGroup * kGroup;
  __builtin_memset(tile.outputs, 0, sizeof(float) * static_cast<std::size_t>(rows * width));
  for (int row = 0; row < tile.count; ++row) tile.most[row] = negative_infinity(), tile.total[row] = 0.0f;
  in_pieces<kMatrixPiece>(tile.panels, tile.panel_count, tile.band, tile.count, [&](const Piece& piece) {
    score_panels(tile.rows, tile.count, tile.columns.size, tile.band, piece.panels, piece.count, tile.columns.across,
                 tile.scores, kWideStride);
    in_groups(tile.count, tile.band, piece.panels, piece.count, [&](int first, int end, int seen) {
      for (int row = first; row < end; ++row) {
        float* scores = tile.scores + row * kWideStride;
        if (row < seen) ask_for(tile.columns.along + piece.panels[row].place * panel, panel);
        hide(scores, piece.panels, piece.open, seen, tile.band, row);
        const float before = tile.most[row], found = tile.factor * highest(scores, seen);
        const float most = found > before ? found : before;
        const float share = found > before ? power_of_two(before - most) : 1.0f;
        tile.total[row] = tile.total[row] * share + weigh(scores, seen, tile.factor, finite(most));
        tile.most[row] = most;
        scale_row(tile.outputs + row * width, tile.columns.strips, share);
      }
      add_values(tile.scores + first * kWideStride, kWideStride, piece.panels, seen, tile.columns.along,
                 tile.columns.strips, tile.outputs + first * width);
    });
  });
}

void mass(const MassTile& tile) {
  float* sums = tile.sums;
  in_pieces<kPiece>(tile.panels, tile.panel_count, tile.band, tile.count, [&](const Piece& piece) {
    score_panels(tile.rows, tile.count, tile.size, tile.band, piece.panels, piece.count, tile.across, tile.scores,
                 kStride);
    in_groups(tile.count, tile.band, piece.panels, piece.count, [&](int first, int end, int seen) {
      for (int row = first; row < end; ++row) {
        float* scores = tile.scores + row * kStride;
        hide(scores, piece.panels, piece.open, seen, tile.band, row);
        const Lanes shifts = spread(-tile.shifts[row]), factors = spread(tile.factor);
        for (int k = 0; k < seen; ++k) {
          const Lanes weight = power_of_two(multiply_add(load(scores + 16 * k), factors, shifts));
          store(sums + 16 * k, add(load(sums + 16 * k), weight));
        }
      }
    });
    sums += kPanel * piece.count;
  });
}

void strip(const StripTile& tile) {
  const int count = static_cast<int>(tile.panel_count);
  const std::int64_t stride = kPanel * tile.panel_count;
  const std::int64_t lines = (tile.count + tile.height - 1) / tile.height;
  __builtin_memset(tile.sums, 0, sizeof(float) * static_cast<std::size_t>(lines * stride));
  score_panels(tile.rows, tile.count, tile.size, tile.band, tile.panels, count, tile.across, tile.scores, stride);
  const int open = open_to_all(tile.panels, count, tile.band, tile.count);
  in_groups(tile.count, tile.band, tile.panels, count, [&](int first, int end, int seen) {
    for (int row = first; row < end; ++row) add_share(tile, row, open, seen, tile.factor);
  });
}

}  // namespace

const AttentionKernels& attention_matrices() {
  static const AttentionKernels kernels = {
      pack_rows, pack_across, pack_along, forward, mass, strip, nullptr, avx512_bf16::attention_table().finish,
      nullptr,   true};
  return kernels;
}

#else

const AttentionKernels& attention_matrices() { return attention_kernels(); }

#endif

}  // namespace gossamer
