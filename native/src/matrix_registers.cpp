// Asking for the matrix registers, and setting them up. Compiled with instructions that few processors have.

#include "matrix_registers.hpp"

#include <cstdint>

#include "cpu.hpp"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gossamer {

#if defined(__AMX_BF16__) && defined(__linux__)

namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; Linux 5.16

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool processor_has_them() {
  // leaf 7: bit 22 AMX-BF16 and bit 24 AMX-TILE
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1u) && (d >> 24 & 1u);
}

bool allowed() {
  static const bool found = processor_has_them() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return found;
}

}  // namespace

bool matrix_registers_usable() { return instruction_set() == "avx512_bf16" && allowed(); }

MatrixRegisters::MatrixRegisters(bool wanted) : wanted_(wanted) {
  if (!wanted_) return;
  const Configuration configuration;
  __asm__ volatile("" : : "m"(configuration));  // the intrinsic of some compilers reads its first eight bytes only
  _tile_loadconfig(&configuration);
}

MatrixRegisters::~MatrixRegisters() {
  if (wanted_) _tile_release();
}

#else

bool matrix_registers_usable() { return false; }
MatrixRegisters::MatrixRegisters(bool wanted) : wanted_(wanted) {}
MatrixRegisters::~MatrixRegisters() = default;

#endif

}  // namespace gossamer
