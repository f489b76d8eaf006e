// Which scores a row sees, and their softmax, a few panels at a time.
//
// Included once for every instruction set, inside its own namespace.

constexpr std::int64_t kStride = kPiece * kPanel;  // scores of a row

// Which of a panel's columns a row sees.
inline std::uint32_t visible(const Panel& panel, const Band& band, int row) {
  const std::int64_t first = std::int64_t{kPanel} * panel.place;
  return panel.bits & bits_between(band.low + row - first, band.high + row - first);
}

// How many of the first panels every row of a tile sees whole.
inline int open_to_all(const Panel* panels, int count, const Band& band, int rows) {
  for (int k = 0; k < count; ++k) {
    const std::int64_t first = std::int64_t{kPanel} * panels[k].place;
    if (panels[k].bits != 0xffffu || !band.covers(first, first + kPanel - 1, rows)) return k;
  }
  return count;
}

// −∞ where a row does not see a column of the panels behind those that are open to all.
inline void hide(float* scores, const Panel* panels, int open, int count, const Band& band, int row) {
  for (int k = open; k < count; ++k) {
    const std::uint32_t bits = visible(panels[k], band, row);
    if (bits != 0xffffu) store(scores + 16 * k, choose(bits, load(scores + 16 * k), negative_infinity()));
  }
}

inline float highest(const float* scores, std::int64_t count) {
  Lanes most = spread(negative_infinity());
  for (std::int64_t k = 0; k < count; ++k) most = larger(load(scores + 16 * k), most);
  return largest(most);
}

// scores = 2^(factor · scores − shift); returns their sum.
inline float exponentials(float* scores, std::int64_t count, float factor, float shift) {
  Lanes total = zero();
  const Lanes factors = spread(factor), shifts = spread(-shift);
  for (std::int64_t k = 0; k < count; ++k) {
    const Lanes weight = power_of_two(multiply_add(load(scores + 16 * k), factors, shifts));
    store(scores + 16 * k, weight);
    total = add(total, weight);
  }
  return sum(total);
}

inline float finite(float most) { return most == negative_infinity() ? 0.0f : most; }

// Some panels of a tile, and those behind them.
struct Piece {
  const Panel* panels;
  int count;
  std::int64_t behind;
  int open;  // how many of the first panels every row sees whole

  Coming across(const Columns& columns) const { return {panels, count, columns.across, columns.size * kPanel}; }
  Coming along(const Columns& columns) const { return {panels, count, columns.along, columns.strips * 256}; }
  Coming next_across(const Columns& columns) const {
    return {panels + count, behind, columns.across, columns.size * kPanel};
  }
};

// Calls work(piece) for `Most` panels after the other.
template <int Most, typename Work>
inline void in_pieces(const Panel* panels, std::int64_t panel_count, const Band& band, int rows, Work&& work) {
  for (std::int64_t begin = 0; begin < panel_count; begin += Most) {
    const int count = static_cast<int>(panel_count - begin < Most ? panel_count - begin : Most);
    work(Piece{panels + begin, count, panel_count - begin - count, open_to_all(panels + begin, count, band, rows)});
  }
}

// Softmax of a row of antidiagonals, added to the sums of its line.
inline void add_share(const StripTile& tile, int row, int open, int seen, float factor) {
  const std::int64_t stride = kPanel * tile.panel_count;
  float* scores = tile.scores + row * stride;
  float* sums = tile.sums + row / tile.height * stride;
  hide(scores, tile.panels, open, seen, tile.band, row);
  const float total = exponentials(scores, seen, factor, finite(factor * highest(scores, seen)));
  if (total == 0.0f) return;
  const Lanes share = spread(1.0f / total);
  for (int k = 0; k < seen; ++k)
    store(sums + 16 * k, multiply_add(load(scores + 16 * k), share, load(sums + 16 * k)));
}
