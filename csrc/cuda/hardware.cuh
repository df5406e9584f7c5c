// What the hardware does in one instruction, under plain names.
#pragma once

#include "../element.h"

#include <cuda_runtime.h>

#define FOGZO_DEVICE __device__ __forceinline__
#define FOGZO_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#define FOGZO_PARAMETER const __grid_constant__
#define FOGZO_SHARED __shared__

namespace fogzo::cuda {

using Words4 = uint4;

FOGZO_DEVICE int thread() { return int(threadIdx.x); }
FOGZO_DEVICE int64_t block() { return int64_t(blockIdx.x); }
FOGZO_DEVICE void barrier() { __syncthreads(); }

// Approximate functions: far cheaper than the library's (docs/contract.md, section 6, allows for them).
FOGZO_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FOGZO_DEVICE float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FOGZO_DEVICE float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FOGZO_DEVICE void fast_cos_sin(float x, float &cosine, float &sine) {
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(x));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(x));
}

// c plus the bytes of a, each times that of `weights`.
FOGZO_DEVICE int weigh_bytes(uint32_t a, uint32_t weights, int c) {
  return int(__dp4a(a, weights, uint32_t(c)));
}

// Two floats as bfloat16 or float16, to nearest even; the first in the lower half.
FOGZO_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FOGZO_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

FOGZO_DEVICE float widen_float16(uint32_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(half)));
  return x;
}

// The bytes of a and b that the digits of `which` name.
FOGZO_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

// What the thread of the same warp holds whose number differs in `bit`; all threads of the warp ask.
template <int N> FOGZO_DEVICE void from_warp(const float (&x)[N], int bit, float (&other)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    other[i] = __shfl_xor_sync(0xFFFFFFFFu, x[i], bit);
}

FOGZO_DEVICE double from_warp(double x, int bit) { return __shfl_xor_sync(0xFFFFFFFFu, x, bit); }

// Pointers come from a table, so the compiler must be told that they lead to global memory.
template <class T> FOGZO_DEVICE T *global(T *at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

FOGZO_DEVICE Words4 load16(const void *at) { return *global(static_cast<const Words4 *>(at)); }
// In assembly, as the compiler may make two stores of one.
FOGZO_DEVICE void store16(void *at, const Words4 &x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
FOGZO_DEVICE void store8(void *at, uint32_t low, uint32_t high) {
  *global(static_cast<uint2 *>(at)) = make_uint2(low, high);
}

FOGZO_DEVICE void add_one(int64_t *counter) {
  atomicAdd(global(reinterpret_cast<unsigned long long *>(counter)), 1ull);
}

} // namespace fogzo::cuda
