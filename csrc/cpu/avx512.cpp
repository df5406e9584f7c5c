// The kernels for AVX-512 (F, BW, DQ, VL).
#include "prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))),      \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FOGZO_ISA 512
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const fogzo::cpu::Kernels *fogzo::cpu::avx512_kernels() {
  static constexpr Kernels table = table_of("avx512");
  return &table;
}
#endif
