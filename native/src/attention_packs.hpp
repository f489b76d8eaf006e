// Heads packed into the forms that products read, a few at a time, by all threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_problem.hpp"
#include "attention_tiles.hpp"

namespace gossamer {

constexpr std::int64_t kRound = std::int64_t{1} << 22;  // numbers that are packed together if heads are short
constexpr std::int64_t kPackPanels = 16;                // panels that one thread packs at a time

// Keys and values of one key head after the other, packed a few heads at a time.
//
// round(first, last) is called for key heads first … last − 1, counted over the batch.
template <typename Round>
void in_rounds(std::int64_t heads, std::int64_t numbers, Round&& round) {
  const std::int64_t together = std::clamp<std::int64_t>(kRound / std::max<std::int64_t>(numbers, 1), 1,
                                                         std::max<std::int64_t>(heads, 1));
  for (std::int64_t first = 0; first < heads; first += together) round(first, std::min(first + together, heads));
}

// Calls pack(head, first panel, last panel) for some heads of a tensor, a few panels at a time.
template <typename Pack>
void pack_heads(std::int64_t panels, std::int64_t first, std::int64_t last, int threads, Pack&& pack) {
  const std::int64_t chunks = (panels + kPackPanels - 1) / kPackPanels;
  share_items((last - first) * chunks, threads, [&] {
    return [&](std::int64_t item) {
      const std::int64_t begin = item % chunks * kPackPanels;
      pack(first + item / chunks, begin, std::min(begin + kPackPanels, panels));
    };
  });
}

using KeyBits = std::vector<std::vector<std::uint16_t>>;

inline KeyBits key_bits(const Problem& p) {
  KeyBits bits;
  for (std::int64_t b = 0; b < (p.key_mask ? p.batch : 1); ++b)
    bits.push_back(real_keys(p.key_mask ? p.key_mask + b * p.keys : nullptr, p.keys));
  return bits;
}

inline const std::vector<std::uint16_t>& of_batch(const KeyBits& bits, std::int64_t batch) {
  return bits[bits.size() > 1 ? static_cast<std::size_t>(batch) : 0];
}

// Panels of `count` vectors, and one more that makes pairs of them.
inline std::int64_t paired_panels(std::int64_t count) { return (count + 2 * kPanel - 1) / (2 * kPanel) * 2; }

// Packs heads first … last − 1 of a tensor across, and those of another of the same length along; the same one may be
// both, and without a target nothing is packed.
inline void pack(const AttentionKernels& kernels, const Heads& one, float* across, const Heads& other, float* along,
                 std::int64_t per_batch, std::int64_t first, std::int64_t last, const KeyBits* bits, int threads) {
  const std::int64_t room = paired_panels(one.length);
  const std::int64_t size = Packing(kernels, one.size).across, strips = Packing(kernels, other.size).along;
  pack_heads(one.panels(), first, last, threads, [&](std::int64_t head, std::int64_t begin, std::int64_t end) {
    const std::int64_t batch = head / per_batch, at = (head - first) * room + begin;
    if (across) kernels.across(one.vectors(batch, head % per_batch), begin, end, across + at * size);
    if (along)
      kernels.along(other.vectors(batch, head % per_batch), begin, end,
                    bits ? of_batch(*bits, batch).data() : nullptr, along + at * strips);
  });
}

// Heads first … last − 1 of a tensor in both forms.
struct PackedHeads {
  std::int64_t size, strips, across_numbers, along_numbers;
  Floats across, along;

  PackedHeads(const Heads& tensor, std::int64_t per_batch, std::int64_t first, std::int64_t last, const KeyBits* bits,
              int threads)
      : size(tensor.size), strips(tensor.strips()), across_numbers(paired_panels(tensor.length) * kPanel * size),
        along_numbers(paired_panels(tensor.length) * 256 * strips), across((last - first) * across_numbers),
        along((last - first) * along_numbers) {
    pack(attention_kernels(), tensor, across.get(), tensor, along.get(), per_batch, first, last, bits, threads);
  }
  Columns columns(std::int64_t head) const {
    return {across.get() + head * across_numbers, size, along.get() + head * along_numbers, strips};
  }
};

}  // namespace gossamer
