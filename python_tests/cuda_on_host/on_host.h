// The CUDA kernels on the CPU: what csrc/cuda/hardware.cuh names, in plain C++. Blocks run one after the
// other, and threads too, but for those of a kernel with barriers. Wide accesses must be aligned.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define FOGZO_DEVICE inline
#define FOGZO_KERNEL(THREADS, BLOCKS) void
#define FOGZO_PARAMETER const
#define FOGZO_SHARED static

namespace fogzo::cuda {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

inline thread_local int current_thread = 0;
inline int64_t current_block = 0;
inline std::barrier<> *current_barrier = nullptr;

inline int thread() { return current_thread; }
inline int64_t block() { return current_block; }
inline void barrier() { current_barrier->arrive_and_wait(); }

inline float fast_log2(float x) { return std::log2(x); }
inline float fast_rcp(float x) { return 1.0f / x; }
inline float fast_sqrt(float x) { return std::sqrt(x); }
inline void fast_cos_sin(float x, float &cosine, float &sine) {
  cosine = std::cos(x);
  sine = std::sin(x);
}

inline int weigh_bytes(uint32_t a, uint32_t weights, int c) {
  for (int i = 0; i < 32; i += 8)
    c += int((a >> i & 0xFF) * (weights >> i & 0xFF));
  return c;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i)
    found |= uint32_t(bytes >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return found;
}

inline uint32_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

// To nearest even by the additions of floats: below 2^-14 halves are multiples of 2^-24.
inline uint32_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  float magnitude = std::fabs(x);
  if (!(magnitude == magnitude))
    return 0x7FFFu;
  if (magnitude < 0x1p-14f)
    return sign | uint32_t(std::nearbyint(magnitude * 0x1p24f));
  if (magnitude >= 65520.0f)
    return sign | 0x7C00u;
  std::memcpy(&bits, &magnitude, 4);
  return sign | (((bits + 0xFFFu + (bits >> 13 & 1)) >> 13) - (112u << 10));
}

inline float widen_float16(uint32_t half) {
  const int exponent = int(half >> 10 & 31), mantissa = int(half & 0x3FF);
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                         : std::ldexp(float(mantissa), -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

inline uint32_t pack_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline uint32_t pack_float16(float low, float high) { return to_float16(low) | to_float16(high) << 16; }

// By memory, as the threads of a warp run one after the other here.
template <class T, int N> void from_warp(const T (&x)[N], int bit, T (&other)[N]) {
  static T held[1024][N];
  barrier(); // all have read what lay there
  std::memcpy(held[thread()], x, sizeof x);
  barrier();
  if (bit >= 32)
    throw std::logic_error("a warp has 32 threads");
  std::memcpy(other, held[thread() ^ bit], sizeof x);
}

inline double from_warp(double x, int bit) {
  const double held[1] = {x};
  double other[1];
  from_warp(held, bit, other);
  return other[0];
}

template <class T> T *global(T *at) {
  if (uintptr_t(at) % sizeof(T))
    throw std::logic_error("an access of " + std::to_string(sizeof(T)) + " bytes is not aligned");
  return at;
}

inline Words4 load16(const void *at) { return *global(static_cast<const Words4 *>(at)); }
inline void store16(void *at, const Words4 &x) { *global(static_cast<Words4 *>(at)) = x; }
inline void store8(void *at, uint32_t low, uint32_t high) {
  *global(static_cast<uint64_t *>(at)) = uint64_t(high) << 32 | low;
}

inline void add_one(int64_t *counter) { ++*global(counter); }

} // namespace fogzo::cuda
