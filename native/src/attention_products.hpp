// The two products of attention: rows with panels across (scores), and weights with panels along (sums of vectors).
//
// Both keep a block of results in registers, of a few rows × a few registers of sixteen, and read a number of a row for
// all of them. Included once for every instruction set, inside its own namespace.

#if defined(__AVX512F__)
constexpr int kRows = 8, kWide = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kWide = 1;
#else
constexpr int kRows = 2, kWide = 1;
#endif
constexpr std::int64_t kDeep = 128;  // numbers of a panel that stay in the first-level cache while rows pass by

// Panels that are read after those of a product, in a form whose panels are `size` numbers each.
struct Coming {
  const Panel* panels;
  std::int64_t count;
  const float* base;
  std::int64_t size;

  const float* at(std::int64_t k, std::int64_t number, const float* otherwise) const {
    return k < count ? base + panels[k].place * size + number : otherwise;
  }
};

// Calls body with a width of at most kWide as a compile-time constant until all of `count` are done.
template <typename Body>
static inline void in_widths(std::int64_t count, Body&& body) {
  std::int64_t done = 0;
  while (done < count) {
    const std::int64_t left = count - done;
    if constexpr (kWide == 3) {
      if (left == 3 || left > 4) body(done, Count<3>{}), done += 3;
      else if (left >= 2) body(done, Count<2>{}), done += 2;
      else body(done, Count<1>{}), done += 1;
    } else {
      body(done, Count<1>{}), done += 1;
    }
  }
}

// The same for rows.
template <typename Body>
static inline void in_rows(int count, Body&& body) {
  int done = 0;
  while (done < count) {
    const int left = count - done;
    if (left >= kRows) body(done, Count<kRows>{}), done += kRows;
    else if (kRows > 4 && left >= 4) body(done, Count<4>{}), done += 4;
    else if (left >= 2) body(done, Count<2>{}), done += 2;
    else body(done, Count<1>{}), done += 1;
  }
}

// Both ask for what the next products will read, a cache line for every number of a row: a processor's own guesses stop
// at the end of a page, and a panel is hardly longer than one.

// out[r][16 w …] = (or +=) Σ_i rows[r][i] · panels[w][i]
template <int Rows, int Wide>
__attribute__((noinline)) void scores_of(const float* rows, std::int64_t stride, std::int64_t length,
                                         const float* const* panels, const float* near, float* out,
                                         std::int64_t out_stride, bool add) {
  Lanes sums[Rows][Wide];
  for (int r = 0; r < Rows; ++r)
    for (int w = 0; w < Wide; ++w) sums[r][w] = add ? load(out + r * out_stride + 16 * w) : zero();
  const float* from[Wide];
  for (int w = 0; w < Wide; ++w) from[w] = panels[w];
  for (std::int64_t i = 0; i < length; ++i) {
    __builtin_prefetch(near + 16 * i, 0, 2);
    Lanes columns[Wide];
#pragma GCC unroll 8
    for (int w = 0; w < Wide; ++w) columns[w] = load(from[w] + 16 * i);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Lanes one = spread(rows[r * stride + i]);
#pragma GCC unroll 8
      for (int w = 0; w < Wide; ++w) sums[r][w] = multiply_add(one, columns[w], sums[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < Wide; ++w) store(out + r * out_stride + 16 * w, sums[r][w]);
}

// out[r][16 w …] = out · shares[r] + Σ over panels, and the sixteen columns c of each, of weights[r][c] · along[c][w]
template <int Rows, int Wide>
__attribute__((noinline)) void sums_of(const float* weights, std::int64_t stride, const Panel* panels,
                                       std::int64_t count, const float* along, std::int64_t panel_size,
                                       const Coming& next, std::int64_t number, const float* shares, float* out,
                                       std::int64_t out_stride) {
  Lanes sums[Rows][Wide];
  for (int r = 0; r < Rows; ++r) {
    const Lanes share = spread(shares ? shares[r] : 1.0f);
    for (int w = 0; w < Wide; ++w) sums[r][w] = multiply(load(out + r * out_stride + 16 * w), share);
  }
  for (std::int64_t k = 0; k < count; ++k) {
    const float* from = along + panels[k].place * panel_size;
    const float* near = next.at(k, number, from);
    const float* at = weights + 16 * k;
    for (int c = 0; c < 16; ++c) {
      __builtin_prefetch(near + 16 * c, 0, 2);
      Lanes columns[Wide];
#pragma GCC unroll 8
      for (int w = 0; w < Wide; ++w) columns[w] = load(from + 256 * w + 16 * c);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Lanes one = spread(at[r * stride + c]);
#pragma GCC unroll 8
        for (int w = 0; w < Wide; ++w) sums[r][w] = multiply_add(one, columns[w], sums[r][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int w = 0; w < Wide; ++w) store(out + r * out_stride + 16 * w, sums[r][w]);
}

// How many of the first panels some row of a group, whose last row is `last`, may see.
static inline int seen_by(const Band& band, int last, const Panel* panels, int count) {
  while (count && std::int64_t{kPanel} * panels[count - 1].place >= band.high + last) --count;
  return count;
}

// Scores of `count` rows with some panels, `stride` apart. What no row of a group sees is left as it was.
static inline void all_scores(const float* rows, int count, std::int64_t size, const Band& band, const Panel* panels,
                              int panel_count, const float* across, const Coming& next, float* scores,
                              std::int64_t stride) {
  in_widths(panel_count, [&](std::int64_t first, auto wide) {
    constexpr int kCount = decltype(wide)::value;
    const float* from[kCount];
    for (std::int64_t begin = 0; begin < size; begin += kDeep) {
      const std::int64_t length = size - begin < kDeep ? size - begin : kDeep;
      for (int w = 0; w < kCount; ++w) from[w] = across + (panels[first + w].place * size + begin) * kPanel;
      in_rows(count, [&](int row, auto some) {
        constexpr int kSome = decltype(some)::value;
        if (std::int64_t{kPanel} * panels[first].place >= band.high + row + kSome - 1) return;
        const int group = row / kRows;
        const float* near = group < kCount ? next.at(first + group, begin * kPanel, from[0]) : from[0];
        scores_of<kSome, kCount>(rows + row * size + begin, size, length, from, near,
                                 scores + row * stride + first * kPanel, stride, begin > 0);
      });
    }
  });
}

// sums[row] = sums[row] · shares[row] + Σ weights · along
static inline void all_sums(const float* weights, std::int64_t stride, int count, const Band& band, const Panel* panels,
                            int panel_count, const float* along, std::int64_t strips, const Coming& next,
                            const float* shares, float* sums) {
  const Coming none{nullptr, 0, nullptr, 0};
  in_widths(strips, [&](std::int64_t first, auto wide) {
    in_rows(count, [&](int row, auto some) {
      constexpr int kSome = decltype(some)::value, kCount = decltype(wide)::value;
      const int group = row / kRows;
      sums_of<kSome, kCount>(weights + row * stride, stride, panels, seen_by(band, row + kSome - 1, panels, panel_count),
                             along + first * 256, strips * 256, group < kCount ? next : none, (first + group) * 256,
                             shares ? shares + row : nullptr, sums + (row * strips + first) * 16, strips * 16);
    });
  });
}
