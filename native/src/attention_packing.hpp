// Vectors of a tensor into the forms that products of attention read, and sums back into tensors.
//
// Included once for every instruction set, inside its own namespace.

template <typename Stored>
void pack_rows(const Vectors& from, std::int64_t first, std::int64_t last, float factor, float* target) {
  const Lanes factors = spread(factor);
  for (std::int64_t vector = first; vector < last; ++vector, target += from.size)
    for (std::int64_t i = 0; i < from.size; i += 16)
      store_some(target + i, multiply(sixteen<Stored>(from, vector, i), factors), from.size - i);
}

template <typename Stored>
void pack_across(const Vectors& from, std::int64_t first, std::int64_t last, float* target) {
  for (std::int64_t panel = first; panel < last; ++panel, target += from.size * kPanel) {
    const std::int64_t begin = panel * kPanel, count = from.count - begin;
    for (std::int64_t i = 0; i < from.size; i += 16) {
      Lanes block[16];
      for (int c = 0; c < 16; ++c) block[c] = c < count ? sixteen<Stored>(from, begin + c, i) : zero();
      transpose(block);
      const std::int64_t left = from.size - i < 16 ? from.size - i : 16;
      for (std::int64_t k = 0; k < left; ++k) store(target + (i + k) * kPanel, block[k]);
    }
  }
}

template <typename Stored>
void pack_along(const Vectors& from, std::int64_t first, std::int64_t last, const std::uint16_t* bits, float* target) {
  const std::int64_t strips = (from.size + 15) / 16;
  for (std::int64_t panel = first; panel < last; ++panel, target += strips * 256) {
    const std::int64_t begin = panel * kPanel, count = from.count - begin;
    const std::uint32_t wanted = bits ? bits[panel] : 0xffffu;
    for (int c = 0; c < 16; ++c) {
      const bool there = c < count && (wanted >> c & 1u);
      for (std::int64_t strip = 0; strip < strips; ++strip)
        store(target + strip * 256 + 16 * c, there ? sixteen<Stored>(from, begin + c, 16 * strip) : zero());
    }
  }
}

void rows_any(const Vectors& from, std::int64_t first, std::int64_t last, float factor, float* target) {
  if (from.value == Value::float32) pack_rows<Float32>(from, first, last, factor, target);
  else pack_rows<BFloat16>(from, first, last, factor, target);
}

void across_any(const Vectors& from, std::int64_t first, std::int64_t last, float* target) {
  if (from.value == Value::float32) pack_across<Float32>(from, first, last, target);
  else pack_across<BFloat16>(from, first, last, target);
}

void along_any(const Vectors& from, std::int64_t first, std::int64_t last, const std::uint16_t* bits, float* target) {
  if (from.value == Value::float32) pack_along<Float32>(from, first, last, bits, target);
  else pack_along<BFloat16>(from, first, last, bits, target);
}

// `count` numbers times a factor, rounded to what a tensor holds.
static inline void write_row(const float* from, std::int64_t count, float factor, Value value, void* outputs,
                             std::int64_t offset) {
  if (value == Value::float32) {
    float* to = static_cast<float*>(outputs) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
  } else {
    std::uint16_t* to = static_cast<std::uint16_t*>(outputs) + offset;
    for (std::int64_t i = 0; i < count; ++i) to[i] = round_to_bfloat16(from[i] * factor);
  }
}

void write(const float* sums, int rows, std::int64_t strips, float factor, std::int64_t size, Value value,
           void* outputs,
           std::int64_t stride) {
  for (int row = 0; row < rows; ++row) write_row(sums + row * strips * 16, size, factor, value, outputs, row * stride);
}
