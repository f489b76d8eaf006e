// Scores of features for tokens by the matrix registers of a processor (AMX), from numbers rounded to bfloat16.
//
// Compiled with instructions that few processors have, and called only where `matrix_registers_usable` says so.

#include <cstdint>

#include "codes.hpp"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace gossamer {

#if defined(__AMX_BF16__)

void score_tile(const ScoreTile& tile) {
  const auto* features = static_cast<const std::uint16_t*>(tile.features);
  const auto* tokens = static_cast<const std::uint16_t*>(tile.tokens);
  const std::int64_t size = tile.size, line = 2 * size;
  const std::uint16_t* lower = features + 16 * size;
  const std::uint16_t* right = tokens + 16 * size;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t channel = 0; channel < size; channel += 32) {
    _tile_loadd(4, features + channel, line);
    _tile_loadd(6, tokens + 16 * channel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + 16 * channel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + channel, line);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, tile.scores, 4 * kTokens);
  _tile_stored(1, tile.scores + 16, 4 * kTokens);
  _tile_stored(2, tile.scores + 16 * kTokens, 4 * kTokens);
  _tile_stored(3, tile.scores + 16 * kTokens + 16, 4 * kTokens);
}

#else

void score_tile(const ScoreTile&) {}

#endif

}  // namespace gossamer
