// Matching pursuit with products of atoms, so that a step costs one row of them, and the orthogonal one.
//
// Compiled once for every instruction set, into the namespace GOSSAMER_ISA. It must not use anything from the standard
// library. Vectors of 64 bytes are those of the compiler, which makes of them what registers there are.

#include "pursuit.hpp"

#include <cstddef>
#include <cstdint>

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Numbers __attribute__((vector_size(64)));
  typedef std::int32_t Places __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double Numbers __attribute__((vector_size(64)));
  typedef std::int64_t Places __attribute__((vector_size(64)));
};
template <typename T>
constexpr std::int64_t kLanes = 64 / sizeof(T);
template <typename T>
using Numbers = typename Vector<T>::Numbers;
template <typename T>
using Places = typename Vector<T>::Places;

template <typename T>
inline Numbers<T> read(const T* from) {
  Numbers<T> found;
  __builtin_memcpy(&found, from, sizeof found);
  return found;
}
template <typename T>
inline void write(T* to, Numbers<T> numbers) {
  __builtin_memcpy(to, &numbers, sizeof numbers);
}
template <typename T>
inline Numbers<T> spread(T value) {
  return value - Numbers<T>{};
}

template <typename T>
inline T product(const T* a, const T* b, std::int64_t size) {
  Numbers<T> sums[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kLanes<T> <= size; i += 2 * kLanes<T>)
    for (int s = 0; s < 2; ++s) sums[s] += read(a + i + s * kLanes<T>) * read(b + i + s * kLanes<T>);
  for (; i + kLanes<T> <= size; i += kLanes<T>) sums[0] += read(a + i) * read(b + i);
  T rest = 0;
  for (; i < size; ++i) rest += a[i] * b[i];
  sums[0] += sums[1];
  for (int lane = 0; lane < kLanes<T>; ++lane) rest += sums[0][lane];
  return rest;
}

template <typename T>
inline void add_to(T* target, T factor, const T* row, std::int64_t size) {
  std::int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) write(target + i, read(target + i) + spread(factor) * read(row + i));
  for (; i < size; ++i) target[i] += factor * row[i];
}

template <typename T>
inline T root(T value) {
  if constexpr (sizeof(T) == 4) return __builtin_sqrtf(value);
  else return __builtin_sqrt(value);
}

// ------------------------------------------------------------------------------------------------ the best atom

// Which number is highest, by itself or in size; of equal ones the first. `factor` times `row` is added before.
template <typename T, bool Absolute, bool Adding>
inline std::int64_t highest(T* numbers, T factor, const T* row, std::int64_t count) {
  Numbers<T> best = spread(static_cast<T>(-1)), zeros = {};
  Places<T> where = {}, here, step;
  for (int lane = 0; lane < kLanes<T>; ++lane) here[lane] = lane, step[lane] = kLanes<T>;
  if (!Absolute) best = spread(static_cast<T>(-__builtin_inff()));
  std::int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    if (Adding) __builtin_prefetch(reinterpret_cast<const char*>(row + i) + 1024);
    Numbers<T> number = read(numbers + i);
    if (Adding) {
      number += spread(factor) * read(row + i);
      write(numbers + i, number);
    }
    if (Absolute) number = number < zeros ? -number : number;
    const Places<T> higher = number > best;
    best = higher ? number : best;
    where = higher ? here : where;
    here += step;
  }
  T most = best[0];
  std::int64_t found = where[0];
  for (int lane = 1; lane < kLanes<T> && i; ++lane)
    if (best[lane] > most || (best[lane] == most && where[lane] < found)) most = best[lane], found = where[lane];
  if (!i) most = Absolute ? static_cast<T>(-1) : static_cast<T>(-__builtin_inff());
  for (; i < count; ++i) {
    if (Adding) numbers[i] += factor * row[i];
    const T number = Absolute && numbers[i] < 0 ? -numbers[i] : numbers[i];
    if (number > most) most = number, found = i;
  }
  return found;
}

template <typename T>
bool match(const Atoms<T>& atoms, const PursuitRule& rule, T* common, T* residual, std::int64_t* chosen) {
  const auto first = rule.nonnegative ? highest<T, false, false> : highest<T, true, false>;
  const auto next = rule.nonnegative ? highest<T, false, true> : highest<T, true, true>;
  std::int64_t best = first(common, 0, nullptr, atoms.count);
  for (std::int64_t step = 0; step < rule.steps; ++step) {
    const T value = common[best];
    const bool going = (rule.nonnegative ? value > 0 : value != 0) &&
                       static_cast<double>(root(product(residual, residual, atoms.size))) > rule.tolerance;
    if (!going) {
      for (; step < rule.steps; ++step) chosen[step] = -1;
      return false;
    }
    chosen[step] = best;
    add_to(residual, -value, atoms.rows + best * atoms.size, atoms.size);
    if (step + 1 < rule.steps) best = next(common, -value, atoms.gram + best * atoms.count, atoms.count);
  }
  return true;
}

// ------------------------------------------------------------------------------------------------ orthogonal

// numbers = start − Σ values · rows of the products of atoms
template <typename T>
inline void subtract_rows(const Atoms<T>& atoms, const T* start, const std::int64_t* chosen, const T* values,
                          std::int64_t steps, T* numbers) {
  constexpr int kStrip = 4;
  std::int64_t i = 0;
  for (; i + kStrip * kLanes<T> <= atoms.count; i += kStrip * kLanes<T>) {
    Numbers<T> sums[kStrip];
    for (int s = 0; s < kStrip; ++s) sums[s] = read(start + i + s * kLanes<T>);
    for (std::int64_t step = 0; step < steps; ++step) {
      const T* row = atoms.gram + chosen[step] * atoms.count + i;
      const Numbers<T> value = spread(values[step]);
      for (int s = 0; s < kStrip; ++s) sums[s] -= value * read(row + s * kLanes<T>);
    }
    for (int s = 0; s < kStrip; ++s) write(numbers + i + s * kLanes<T>, sums[s]);
  }
  for (; i < atoms.count; ++i) {
    T sum = start[i];
    for (std::int64_t step = 0; step < steps; ++step) sum -= values[step] * atoms.gram[chosen[step] * atoms.count + i];
    numbers[i] = sum;
  }
}

template <typename T>
std::int64_t match_orthogonally(const Atoms<T>& atoms, const PursuitRule& rule, const T* start, const T* signal,
                                std::int64_t* chosen, T* values, T* residual, T* spare) {
  const auto best_of = rule.nonnegative ? highest<T, false, false> : highest<T, true, false>;
  const std::int64_t most = rule.steps;
  T* common = spare;
  T* factor = common + atoms.count;  // lower triangle, row after row
  T* inverse = factor + most * most; // of its diagonal
  T* fitted = inverse + most;        // factor · fitted = products of the chosen atoms with the signal
  const T enough = (sizeof(T) == 4 ? static_cast<T>(__FLT_EPSILON__) : static_cast<T>(__DBL_EPSILON__)) * 8;
  const auto copy = [](T* to, const T* from, std::int64_t count) {
    __builtin_memcpy(to, from, sizeof(T) * static_cast<std::size_t>(count));
  };
  copy(residual, signal, atoms.size);
  copy(common, start, atoms.count);
  std::int64_t step = 0;
  for (; step < most; ++step) {
    const std::int64_t best = best_of(common, 0, nullptr, atoms.count);
    const T value = common[best];
    if (!(rule.nonnegative ? value > 0 : value != 0)) break;
    if (!(static_cast<double>(root(product(residual, residual, atoms.size))) > rule.tolerance)) break;
    T* row = factor + step * most;
    T left = 1;
    T next = start[best];
    for (std::int64_t i = 0; i < step; ++i) {
      T sum = atoms.gram[best * atoms.count + chosen[i]];
      for (std::int64_t j = 0; j < i; ++j) sum -= factor[i * most + j] * row[j];
      row[i] = sum * inverse[i];
      left -= row[i] * row[i];
      next -= row[i] * fitted[i];
    }
    if (!(left > enough)) break;  // a combination of the chosen ones
    inverse[step] = 1 / root(left);
    chosen[step] = best;
    fitted[step] = next * inverse[step];
    // columns of the triangle, from the last value on
    copy(values, fitted, step + 1);
    for (std::int64_t i = step; i >= 0; --i) {
      values[i] *= inverse[i];
      for (std::int64_t j = 0; j < i; ++j) values[j] -= factor[i * most + j] * values[i];
    }
    copy(residual, signal, atoms.size);
    for (std::int64_t i = 0; i <= step; ++i)
      add_to(residual, -values[i], atoms.rows + chosen[i] * atoms.size, atoms.size);
    if (step + 1 == most) continue;
    subtract_rows(atoms, start, chosen, values, step + 1, common);
    for (std::int64_t i = 0; i <= step; ++i) common[chosen[i]] = 0;
  }
  for (std::int64_t i = step; i < most; ++i) chosen[i] = 0, values[i] = 0;
  return step;
}

// ------------------------------------------------------------------------------------------------ along given atoms

template <typename T>
void follow(const Atoms<T>& atoms, std::int64_t steps, const std::int64_t* chosen, T* values, T* residual) {
  for (std::int64_t step = 0; step < steps; ++step) {
    values[step] = 0;
    if (step + 1 < steps && chosen[step + 1] >= 0) {
      const char* next = reinterpret_cast<const char*>(atoms.rows + chosen[step + 1] * atoms.size);
      for (std::int64_t byte = 0; byte < atoms.size * static_cast<std::int64_t>(sizeof(T)); byte += 64)
        __builtin_prefetch(next + byte);
    }
    if (chosen[step] < 0) continue;
    const T* atom = atoms.rows + chosen[step] * atoms.size;
    values[step] = product(residual, atom, atoms.size);
    add_to(residual, -values[step], atom, atoms.size);
  }
}

template <typename T>
void go_back(const Atoms<T>& atoms, std::int64_t steps, const std::int64_t* chosen, T* flow, T* of_values) {
  for (std::int64_t step = steps - 1; step >= 0; --step) {
    if (chosen[step] < 0) {
      of_values[step] = 0;
      continue;
    }
    const T* atom = atoms.rows + chosen[step] * atoms.size;
    of_values[step] -= product(flow, atom, atoms.size);
    add_to(flow, of_values[step], atom, atoms.size);
  }
}

template <typename T>
void add_gradient(const Atoms<T>& atoms, std::int64_t steps, const std::int64_t* chosen, const T* values,
                  const T* residual, const T* flow, const T* of_values, std::int64_t first, std::int64_t last,
                  T* gradient, T* room) {
  const std::int64_t size = last - first;
  T* left = room;
  T* flowing = room + size;
  __builtin_memcpy(left, residual + first, sizeof(T) * static_cast<std::size_t>(size));
  __builtin_memcpy(flowing, flow + first, sizeof(T) * static_cast<std::size_t>(size));
  for (std::int64_t step = steps - 1; step >= 0; --step) {
    if (chosen[step] < 0) continue;
    const T* atom = atoms.rows + chosen[step] * atoms.size + first;
    T* there = gradient + chosen[step] * atoms.size + first;
    const T value = values[step], of_value = of_values[step];
    for (std::int64_t i = 0; i < size; ++i) {
      const T before = left[i] + value * atom[i];
      there[i] += of_value * before - value * flowing[i];
      flowing[i] += of_value * atom[i];
      left[i] = before;
    }
  }
}

template <typename T>
const PursuitKernels<T>& table_of() {
  static const PursuitKernels<T> kernels = {match<T>, match_orthogonally<T>, follow<T>, go_back<T>, add_gradient<T>};
  return kernels;
}

}  // namespace

const PursuitKernels<float>& pursuit_table() { return table_of<float>(); }
const PursuitKernels<double>& wide_pursuit_table() { return table_of<double>(); }

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
