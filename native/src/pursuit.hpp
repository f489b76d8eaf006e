// What the kernels of pursuit_kernels.cpp work on: signals that are coded greedily, one after the other.
#pragma once

#include <cstdint>

namespace gossamer {

template <typename T>
struct Atoms {
  std::int64_t count, size;
  const T* rows;   // count × size
  const T* gram;   // count × count: products of all atoms
};

struct PursuitRule {
  std::int64_t steps;
  double tolerance;   // length of a residual that is good enough
  bool nonnegative;   // atoms are only added
};

template <typename T>
struct PursuitKernels {
  // Matching pursuit of one signal. `common`: products of all atoms with the residual; both are written to. Atoms are −1
  // from the step on at which the signal is done; returns whether it is not.
  bool (*match)(const Atoms<T>&, const PursuitRule&, T* common, T* residual, std::int64_t* chosen);
  // Orthogonal matching pursuit of one signal; returns the number of steps. `start`: products of all atoms with the
  // signal; `spare` has room for count + steps · (steps + 3) numbers.
  std::int64_t (*match_orthogonally)(const Atoms<T>&, const PursuitRule&, const T* start, const T* signal,
                                     std::int64_t* chosen, T* values, T* residual, T* spare);
  // Values along given atoms; `residual` begins as the signal.
  void (*follow)(const Atoms<T>&, std::int64_t steps, const std::int64_t* chosen, T* values, T* residual);
  // The gradient of `follow`: `flow` begins as that of the last residual and becomes that of the signal, `of_values`
  // becomes what reaches every value in all.
  void (*go_back)(const Atoms<T>&, std::int64_t steps, const std::int64_t* chosen, T* flow, T* of_values);
  // Adds the gradient of the atoms in columns first … last − 1; `room` for twice as many numbers.
  void (*add_gradient)(const Atoms<T>&, std::int64_t steps, const std::int64_t* chosen, const T* values,
                       const T* residual, const T* flow, const T* of_values, std::int64_t first, std::int64_t last,
                       T* gradient, T* room);
};

namespace plain {
const PursuitKernels<float>& pursuit_table();
const PursuitKernels<double>& wide_pursuit_table();
}
namespace avx2 {
const PursuitKernels<float>& pursuit_table();
const PursuitKernels<double>& wide_pursuit_table();
}
namespace avx512 {
const PursuitKernels<float>& pursuit_table();
const PursuitKernels<double>& wide_pursuit_table();
}
namespace avx512_bf16 {
const PursuitKernels<float>& pursuit_table();
const PursuitKernels<double>& wide_pursuit_table();
}

}  // namespace gossamer
