// The matrix registers of a processor (AMX): eight of sixteen rows of 64 bytes.
#pragma once

namespace gossamer {

// Whether products of bfloat16 may use them: where the processor has them, the system lets us, and the instruction set
// in use is the best one.
bool matrix_registers_usable();

// Registers set up for the thread that holds one of these; all eight are whole.
class MatrixRegisters {
 public:
  explicit MatrixRegisters(bool wanted);
  ~MatrixRegisters();
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;

 private:
  const bool wanted_;
};

}  // namespace gossamer
