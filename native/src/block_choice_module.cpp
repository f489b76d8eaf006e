// Which blocks of every row are read, by their scores: the best so many, or the fewest that hold a share of the mass.
//
// Blocks that are read whatever their score come first, and of equal scores the first. A row is put in order only as
// far as it is kept. gossamer.kernels.block_choice checks shapes before; nothing here can.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "parallel.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

using Address = std::uintptr_t;

constexpr std::int64_t kShare = 1 << 13;  // blocks that are worth a thread
constexpr std::size_t kFirst = 16;        // blocks that are put in order at first, then as many as there are already

// Scores (batch, heads, rows, columns) and, of the same shape, what is kept of them.
struct Grid {
  std::int64_t batch, heads, rows, columns;
  const float* scores;
  const std::uint8_t* allowed;                         // (rows, columns)
  const std::uint8_t* always;                          // read whatever its score, where it is allowed; or null
  std::int64_t batch_stride, head_stride, row_stride;  // of `always`
  std::uint8_t* kept;

  std::int64_t count() const { return batch * heads * rows; }
};

// A block as a number, larger where its score is higher, and of equal scores where it is earlier; NaN is above all.
using Place = std::uint64_t;

Place place_of(float score, std::int64_t column) {
  std::uint32_t bits;
  score += 0.0f;  // −0 is as high as +0
  std::memcpy(&bits, &score, 4);
  bits = score != score ? 0xffffffffu : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return Place{bits} << 32 | ~static_cast<std::uint32_t>(column);
}

// One row of blocks: those that must be read are kept from the beginning, the others wait.
class Row {
 public:
  Row(const Grid& grid, std::int64_t index, std::vector<Place>& waiting)
      : scores_(grid.scores + index * grid.columns), kept_(grid.kept + index * grid.columns), waiting_(waiting) {
    const std::int64_t row = index % grid.rows, head = index / grid.rows % grid.heads;
    const std::int64_t batch = index / grid.rows / grid.heads;
    const std::uint8_t* allowed = grid.allowed + row * grid.columns;
    const std::uint8_t* always = grid.always;
    if (always) always += batch * grid.batch_stride + head * grid.head_stride + row * grid.row_stride;
    waiting_.clear();
    for (std::int64_t column = 0; column < grid.columns; ++column) {
      kept_[column] = allowed[column] && always && always[column];
      if (!allowed[column]) continue;
      total_ += scores_[column];
      if (kept_[column]) held_ += scores_[column], ++forced_;
      else waiting_.push_back(place_of(scores_[column], column));
    }
  }

  void keep_best(std::int64_t count) {
    const auto left = static_cast<std::size_t>(std::max<std::int64_t>(count - forced_, 0));
    if (left < waiting_.size())
      std::nth_element(waiting_.begin(), at(left), waiting_.end(), std::greater<Place>());
    for (std::size_t i = 0; i < std::min(left, waiting_.size()); ++i) keep(waiting_[i]);
  }

  void keep_mass(double share) {
    if (share == 1.0) return keep_best(forced_ + static_cast<std::int64_t>(waiting_.size()));
    const double wanted = share * total_;
    for (std::size_t first = 0, last; first < waiting_.size(); first = last) {
      last = std::min(waiting_.size(), std::max(kFirst, 2 * first));
      if (last < waiting_.size()) std::nth_element(at(first), at(last), waiting_.end(), std::greater<Place>());
      std::sort(at(first), at(last), std::greater<Place>());
      for (std::size_t i = first; i < last; ++i) {
        if (!(held_ < wanted)) return;
        held_ += keep(waiting_[i]);
      }
    }
  }

 private:
  std::vector<Place>::iterator at(std::size_t i) { return waiting_.begin() + static_cast<std::ptrdiff_t>(i); }
  float keep(Place place) {
    const std::uint32_t column = ~static_cast<std::uint32_t>(place);
    kept_[column] = 1;
    return scores_[column];
  }

  const float* scores_;
  std::uint8_t* kept_;
  std::vector<Place>& waiting_;
  double total_ = 0.0, held_ = 0.0;
  std::int64_t forced_ = 0;
};

// Rows of a triangle differ in length, so that threads take them in turn.
template <typename Body>
void over_rows(const Grid& grid, int threads, Body&& body) {
  const auto parts = static_cast<int>(std::clamp<std::int64_t>(grid.count() * grid.columns / kShare, 1, threads));
  parallel(parts, [&](int part, int) {
    std::vector<Place> waiting;
    waiting.reserve(static_cast<std::size_t>(grid.columns));
    for (std::int64_t index = part; index < grid.count(); index += parts) {
      Row row(grid, index, waiting);
      body(row, index);
    }
  });
}

// (batch, heads, rows, columns, scores, allowed, always, its three strides, kept)
Grid grid_from(const nb::tuple& given) {
  const auto number = [&](int i) { return nb::cast<std::int64_t>(given[static_cast<std::size_t>(i)]); };
  const auto address = [&](int i) { return nb::cast<Address>(given[static_cast<std::size_t>(i)]); };
  return {number(0), number(1), number(2), number(3),
          reinterpret_cast<const float*>(address(4)),
          reinterpret_cast<const std::uint8_t*>(address(5)),
          reinterpret_cast<const std::uint8_t*>(address(6)),
          number(7), number(8), number(9),
          reinterpret_cast<std::uint8_t*>(address(10))};
}

}  // namespace

void bind_block_choice(nb::module_& m) {
  m.def("best_blocks", [](const nb::tuple& given, Address counts, int threads) {
    const Grid grid = grid_from(given);
    const nb::gil_scoped_release unlocked;
    const auto* of_rows = reinterpret_cast<const std::int64_t*>(counts);
    over_rows(grid, std::max(threads, 1), [&](Row& row, std::int64_t index) { row.keep_best(of_rows[index]); });
  });
  m.def("heaviest_blocks", [](const nb::tuple& given, Address shares, int threads) {
    const Grid grid = grid_from(given);
    const nb::gil_scoped_release unlocked;
    const auto* of_rows = reinterpret_cast<const double*>(shares);
    over_rows(grid, std::max(threads, 1), [&](Row& row, std::int64_t index) { row.keep_mass(of_rows[index]); });
  });
}

}  // namespace gossamer
