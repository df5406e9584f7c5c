// The kernels for AVX2 with FMA and F16C.
#include "prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FOGZO_ISA 256
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const fogzo::cpu::Kernels *fogzo::cpu::avx2_kernels() {
  static constexpr Kernels table = table_of("avx2");
  return &table;
}
#endif
