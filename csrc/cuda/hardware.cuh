// Single instructions of the hardware under plain names. No other file includes CUDA's headers.
#pragma once

#include "../element.h"

#include <cuda_runtime.h>

#define FOGZO_DEVICE __device__ __forceinline__
#define FOGZO_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#define FOGZO_PARAMETER const __grid_constant__
#define FOGZO_SHARED __shared__

namespace fogzo::cuda {

using Words4 = uint4;

// Calls f(0), ..., f(Count - 1).
template <int Count, class F> FOGZO_DEVICE void unrolled(F f) {
#pragma unroll
  for (int i = 0; i < Count; ++i)
    f(i);
}

FOGZO_DEVICE int thread() { return int(threadIdx.x); }
FOGZO_DEVICE int64_t block() { return int64_t(blockIdx.x); }
FOGZO_DEVICE void barrier() { __syncthreads(); }

// Approximate functions: far cheaper than the library's (docs/contract.md, section 6, allows for them).
#define FOGZO_APPROXIMATE(name, instruction)                                                                   \
  FOGZO_DEVICE float name(float x) {                                                                           \
    float y;                                                                                                   \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));                                             \
    return y;                                                                                                  \
  }
FOGZO_APPROXIMATE(fast_log2, "lg2")
FOGZO_APPROXIMATE(fast_rcp, "rcp")
FOGZO_APPROXIMATE(fast_sqrt, "sqrt")
FOGZO_APPROXIMATE(fast_cos, "cos")
FOGZO_APPROXIMATE(fast_sin, "sin")
#undef FOGZO_APPROXIMATE

// Adds to c each byte of a times the byte of `weights` in the same place.
FOGZO_DEVICE int weigh_bytes(uint32_t a, uint32_t weights, int c) {
  return int(__dp4a(a, weights, uint32_t(c)));
}

// Rounds two floats to bfloat16 or float16, to nearest even; the first goes into the lower half.
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

// Takes the bytes of a and b that the digits of `bytes` name.
FOGZO_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t bytes) { return __byte_perm(a, b, bytes); }

// Gives x of the thread of the same warp whose number differs in `bit`; all threads of the warp must call it.
template <class T> FOGZO_DEVICE T from_warp(T x, int bit) { return __shfl_xor_sync(0xFFFFFFFFu, x, bit); }

// Tells the compiler that a pointer, which comes from a table, leads to global memory.
template <class T> FOGZO_DEVICE T *global(T *at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

FOGZO_DEVICE Words4 load16(const void *at) { return *global(static_cast<const Words4 *>(at)); }
// The compiler may split a store of four words; it cannot split the instruction.
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
