// The kernels for whatever the compiler's target is.
#define FOGZO_ISA 0
#include "kernel_table.h"

const fogzo::cpu::Kernels *fogzo::cpu::portable_kernels() {
  static constexpr Kernels table = table_of("portable");
  return &table;
}
