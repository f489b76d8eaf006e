// Products of dense rows with several vectors, where there are thirty-two registers of sixteen lanes.
//
// Included by kernels.cpp inside its namespace, for instruction sets of 512 bits. It must not use anything from the
// standard library.
//
// A few rows meet two vectors at a time while they are in the first-level cache: a loaded input serves all rows, a
// loaded weight both vectors. What the next rows need is asked for meanwhile, so that reading and computing go on side
// by side. Every sum adds what `dense_rows` adds for one vector, in the same order: a text that is read at once has the
// very logits of one that is read token by token.

constexpr int kTileRows = 6, kTileVectors = 2;  // 24 sums of even and of odd sixteens, 2 inputs, a weight: 27 registers
constexpr int kTileMost = 32;                   // vectors whose sums are kept from one range of columns to the next
constexpr std::int64_t kTileColumns = 1024;     // of which kTileRows rows are half of a first-level cache
constexpr std::int64_t kTileLine = kTileColumns + 16;  // no power of two, so that rows lie in different sets of it
constexpr std::int64_t kWay = 4096;             // bytes of a first-level cache that lie in different sets

// What will be read next: of some rows the bytes of thirty-two columns are asked for at each step.
struct Ahead {
  const unsigned char* from;
  int rows;
  std::int64_t stride;  // bytes from one row to the next

  template <int Bytes>
  void fetch_step(std::int64_t step) const {
    const unsigned char* there = from + step * Bytes;
    for (int r = 0; r < rows; ++r, there += stride)  // into the second-level cache: the first is full of what is in use
      for (int line = 0; line < Bytes; line += 64) __builtin_prefetch(there + line, 0, 2);
  }
};

// kTileRows rows from one column on.
struct TileWeights {
  const float* first;
  std::int64_t stride;
};

template <int Count>
using TileSums = Lanes[kTileRows][Count][2];

template <int Count>
inline void tile_step(const float* low, const float* high, std::int64_t stride, const float* x, std::int64_t x_stride,
                      int half, TileSums<Count>& sums) {
  Lanes inputs[Count];
  for (int b = 0; b < Count; ++b) inputs[b] = load(x + b * x_stride);
#pragma GCC unroll kTileRows
  for (int r = 0; r < kTileRows; ++r) {
    Lanes weights = load((r < 3 ? low : high) + r % 3 * stride);
    __asm__("" : "+v"(weights.r));  // else it is loaded for every vector, and loads are what there is too little of
#pragma GCC unroll kTileVectors
    for (int b = 0; b < Count; ++b) sums[r][b][half] = multiply_add(weights, inputs[b], sums[r][b][half]);
  }
}

template <int Count, int Bytes>
inline void tile_products(const TileWeights& weights, std::int64_t columns, const float* x, std::int64_t x_stride,
                          const Ahead& ahead, TileSums<Count>& sums) {
  const float *low = weights.first, *high = low + 3 * weights.stride;
  const std::int64_t steps = columns / 32;
  #pragma GCC unroll 2  // what counts steps takes ports from products
  for (std::int64_t step = 0; step < steps; ++step, low += 32, high += 32, x += 32) {
    ahead.fetch_step<Bytes>(step);
    tile_step<Count>(low, high, weights.stride, x, x_stride, 0, sums);
    tile_step<Count>(low + 16, high + 16, weights.stride, x + 16, x_stride, 1, sums);
  }
  std::int64_t left = columns % 32;
  if (left >= 16) {
    tile_step<Count>(low, high, weights.stride, x, x_stride, 0, sums);
    low += 16, high += 16, x += 16, left -= 16;
  }
  if (left) tile_step<Count>(low, high, weights.stride, x, x_stride, 1, sums);
}

// The sums of the lanes of each, as `sum` adds them.
inline __m128 sum_each(Lanes a, Lanes b, Lanes c, Lanes d) {
  const auto halves = [](Lanes x, Lanes y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x.r, y.r, 0x44), _mm512_shuffle_f32x4(x.r, y.r, 0xee));
  };
  const __m512 low = halves(a, b), high = halves(c, d);
  __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  four = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  four = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four));
}

template <int Count>
inline void write_sums(const TileSums<Count>& sums, float* target, std::int64_t stride) {
  const auto both = [&](int r, int b) { return add(sums[r][b][0], sums[r][b][1]); };
  for (int b = 0; b < Count; ++b)
    _mm_storeu_ps(target + b * stride, sum_each(both(0, b), both(1, b), both(2, b), both(3, b)));
  const int other = Count - 1;
  const __m128 rest = sum_each(both(4, 0), both(5, 0), both(4, other), both(5, other));
  _mm_storel_pi(reinterpret_cast<__m64*>(target + 4), rest);
  if (Count > 1) _mm_storeh_pi(reinterpret_cast<__m64*>(target + stride + 4), rest);
}

template <typename Value>
inline void widen_columns(const void* values, std::int64_t base, std::int64_t columns, float* target) {
  std::int64_t column = 0;
  for (; column + 16 <= columns; column += 16) store(target + column, Value::all(values, base + column));
  if (column < columns) store(target + column, place(Value::all(values, base + column), (1u << (columns - column)) - 1));
}

// kTileRows rows with at most kTileMost vectors.
template <typename Stored>
struct DenseTile {
  alignas(64) float widened[kTileRows * kTileLine];
  alignas(64) Lanes kept[kTileMost / kTileVectors][kTileRows][kTileVectors][2];  // where a range is not the last
  const DenseRows& matrix;
  const Inputs& inputs;
  const Outputs& outputs;
  const bool in_place;

  DenseTile(const DenseRows& m, const Inputs& x, const Outputs& y)
      : matrix(m),
        inputs(x),
        outputs(y),
        in_place(kBits<Stored> == 32 && m.columns % 16 == 0 && m.columns * 4 % kWay != 0) {}

  TileWeights weights(std::int64_t row, std::int64_t begin, std::int64_t columns) {
    const std::int64_t base = row * matrix.columns + begin;
    if (in_place) return {static_cast<const float*>(matrix.values) + base, matrix.columns};
    for (int r = 0; r < kTileRows; ++r)
      widen_columns<Stored>(matrix.values, base + r * matrix.columns, columns, widened + r * kTileLine);
    return {widened, kTileLine};
  }

  template <int Count>
  void products(const TileWeights& weights, std::int64_t row, std::int64_t begin, std::int64_t columns, int vector,
                const Ahead& ahead) {
    TileSums<Count> sums;
    auto& before = kept[vector / kTileVectors];
    for (int r = 0; r < kTileRows; ++r)
      for (int b = 0; b < Count; ++b)
        for (int half = 0; half < 2; ++half) sums[r][b][half] = begin == 0 ? zero() : before[r][b][half];
    tile_products<Count, 4 * kBits<Stored>>(weights, columns, inputs.data + vector * inputs.stride + begin, inputs.stride, ahead, sums);
    if (begin + columns == matrix.columns)
      return write_sums<Count>(sums, outputs.data + vector * outputs.stride + row, outputs.stride);
    for (int r = 0; r < kTileRows; ++r)
      for (int b = 0; b < Count; ++b)
        for (int half = 0; half < 2; ++half) before[r][b][half] = sums[r][b][half];
  }

  void run(std::int64_t row) {
    const std::int64_t columns = matrix.columns, row_bytes = columns * kBits<Stored> / 8;
    const std::int64_t ranges = (columns + kTileColumns - 1) / kTileColumns;
    const std::int64_t most = ((columns + ranges - 1) / ranges + 31) / 32 * 32;  // of a range
    const auto* bytes = static_cast<const unsigned char*>(matrix.values) + row * row_bytes;
    const int parts = (inputs.count + kTileVectors - 1) / kTileVectors;
    for (std::int64_t begin = 0; begin < columns; begin += most) {
      const std::int64_t length = columns - begin < most ? columns - begin : most;
      const bool ends = begin + length == columns;
      const unsigned char* next = ends ? bytes + kTileRows * row_bytes : bytes + (begin + length) * kBits<Stored> / 8;
      const TileWeights there = weights(row, begin, length);
      for (int part = 0; part < parts; ++part) {
        const int vector = part * kTileVectors;
        const int first = part * kTileRows / parts, last = (part + 1) * kTileRows / parts;
        const Ahead ahead{next + first * row_bytes, last - first, row_bytes};
        if (inputs.count - vector >= 2) products<2>(there, row, begin, length, vector, ahead);
        else products<1>(there, row, begin, length, vector, ahead);
      }
    }
  }
};

// Returns the first row that is left over.
template <typename Stored>
std::int64_t dense_tiles(const DenseRows& matrix, std::int64_t first, std::int64_t last, const Inputs& inputs,
                         const Outputs& outputs) {
  DenseTile<Stored> tile(matrix, inputs, outputs);
  std::int64_t row = first;
  for (; row + kTileRows <= last; row += kTileRows) tile.run(row);
  if (row == first || row == last) return row;
  tile.run(last - kTileRows);  // some rows for the second time, which is faster than the others one by one
  return last;
}
