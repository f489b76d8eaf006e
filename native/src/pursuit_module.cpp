// Pursuits as Python calls them: signals, divided among threads.

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "products.hpp"
#include "pursuit.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

template <typename T>
const PursuitKernels<T>& pursuit_kernels() {
  const std::string& name = instruction_set();
  const auto choose = [](const PursuitKernels<float>& narrow, const PursuitKernels<double>& wide) -> const auto& {
    if constexpr (sizeof(T) == 4) return (void)wide, narrow;
    else return (void)narrow, wide;
  };
#if defined(__x86_64__)
  if (name == "avx512_bf16") return choose(avx512_bf16::pursuit_table(), avx512_bf16::wide_pursuit_table());
  if (name == "avx512") return choose(avx512::pursuit_table(), avx512::wide_pursuit_table());
  if (name == "avx2") return choose(avx2::pursuit_table(), avx2::wide_pursuit_table());
#endif
  if (name != "plain") throw std::invalid_argument("no pursuits for instruction set '" + name + "'");
  return choose(plain::pursuit_table(), plain::wide_pursuit_table());
}

template <typename T>
Atoms<T> atoms_of(std::int64_t count, std::int64_t size, Address rows, Address gram) {
  return {count, size, at<T>(rows), at<T>(gram)};
}

template <typename Item>
void over_signals(std::int64_t signals, int threads, Item&& item) {
  over_rows(Share{nullptr, signals, 0}, threads, [&](std::int64_t first, std::int64_t last) { item(first, last); });
}

template <typename T>
void match(const Atoms<T>& atoms, const PursuitRule& rule, std::int64_t signals, T* common, T* residual,
           std::int64_t* chosen, std::int64_t stride, std::uint8_t* going, int threads) {
  over_signals(signals, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i)
      if (going[i])
        going[i] = pursuit_kernels<T>().match(atoms, rule, common + i * atoms.count, residual + i * atoms.size,
                                              chosen + i * stride);
  });
}

template <typename T>
void match_orthogonally(const Atoms<T>& atoms, const PursuitRule& rule, std::int64_t signals, const T* start,
                        const T* x, std::int64_t* chosen, T* values, T* residual, int threads) {
  over_signals(signals, threads, [&](std::int64_t first, std::int64_t last) {
    std::vector<T> spare(static_cast<std::size_t>(atoms.count + rule.steps * (rule.steps + 3)));
    for (std::int64_t i = first; i < last; ++i)
      pursuit_kernels<T>().match_orthogonally(atoms, rule, start + i * atoms.count, x + i * atoms.size,
                                              chosen + i * rule.steps, values + i * rule.steps,
                                              residual + i * atoms.size, spare.data());
  });
}

template <typename T>
void follow(const Atoms<T>& atoms, std::int64_t steps, std::int64_t signals, const std::int64_t* chosen, T* values,
            T* residual, int threads) {
  over_signals(signals, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i)
      pursuit_kernels<T>().follow(atoms, steps, chosen + i * steps, values + i * steps, residual + i * atoms.size);
  });
}

constexpr std::int64_t kLine = 16;  // numbers that threads do not share: a cache line of float32

// Columns of the atoms' gradient are divided among threads, so that no two add to the same number.
template <typename T>
void go_back(const Atoms<T>& atoms, std::int64_t steps, std::int64_t signals, const std::int64_t* chosen,
             const T* values, const T* residual, const T* of_residual, T* flow, T* of_values, T* gradient, int threads) {
  over_signals(signals, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i)
      pursuit_kernels<T>().go_back(atoms, steps, chosen + i * steps, flow + i * atoms.size, of_values + i * steps);
  });
  if (!gradient) return;
  over_signals((atoms.size + kLine - 1) / kLine, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * kLine, last = std::min(atoms.size, end * kLine);
    std::vector<T> room(static_cast<std::size_t>(2 * (last - first)));
    for (std::int64_t i = 0; i < signals; ++i)
      pursuit_kernels<T>().add_gradient(atoms, steps, chosen + i * steps, values + i * steps,
                                        residual + i * atoms.size, of_residual + i * atoms.size, of_values + i * steps,
                                        first, last, gradient, room.data());
  });
}

template <typename Work>
void of_kind(bool wide, Work&& work) {
  if (wide) work(double{});
  else work(float{});
}

}  // namespace

void bind_pursuit(nb::module_& m) {
  m.def("pursuit_match", [](bool wide, std::int64_t count, std::int64_t size, Address rows, Address gram,
                            std::int64_t signals, std::int64_t steps, double tolerance, bool nonnegative,
                            Address common, Address residual, Address chosen, std::int64_t stride, Address going,
                            int threads) {
    of_kind(wide, [&](auto kind) {
      using T = decltype(kind);
      match(atoms_of<T>(count, size, rows, gram), {steps, tolerance, nonnegative}, signals, into<T>(common),
            into<T>(residual), into<std::int64_t>(chosen), stride, into<std::uint8_t>(going), threads);
    });
  });
  m.def("pursuit_match_orthogonally",
        [](bool wide, std::int64_t count, std::int64_t size, Address rows, Address gram, std::int64_t signals,
           std::int64_t steps, double tolerance, bool nonnegative, Address start, Address x, Address chosen,
           Address values, Address residual, int threads) {
          of_kind(wide, [&](auto kind) {
            using T = decltype(kind);
            match_orthogonally(atoms_of<T>(count, size, rows, gram), {steps, tolerance, nonnegative}, signals,
                               at<T>(start), at<T>(x), into<std::int64_t>(chosen), into<T>(values), into<T>(residual),
                               threads);
          });
        });
  m.def("pursuit_follow", [](bool wide, std::int64_t count, std::int64_t size, Address rows, std::int64_t signals,
                             std::int64_t steps, Address chosen, Address values, Address residual, int threads) {
    of_kind(wide, [&](auto kind) {
      using T = decltype(kind);
      follow(atoms_of<T>(count, size, rows, 0), steps, signals, at<std::int64_t>(chosen), into<T>(values),
             into<T>(residual), threads);
    });
  });
  m.def("pursuit_go_back", [](bool wide, std::int64_t count, std::int64_t size, Address rows, std::int64_t signals,
                              std::int64_t steps, Address chosen, Address values, Address residual,
                              Address of_residual, Address flow, Address of_values, Address gradient, int threads) {
    of_kind(wide, [&](auto kind) {
      using T = decltype(kind);
      go_back(atoms_of<T>(count, size, rows, 0), steps, signals, at<std::int64_t>(chosen), at<T>(values),
              at<T>(residual), at<T>(of_residual), into<T>(flow), into<T>(of_values), into<T>(gradient), threads);
    });
  });
}

}  // namespace gossamer
