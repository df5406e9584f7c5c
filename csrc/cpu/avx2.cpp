// The kernels for AVX2 with FMA and F16C.
#include "outside.h"

namespace fogzo::cpu {

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace {

constexpr int64_t kGroup = 8; // Philox calls in flight
constexpr int kVectors = 2;   // of four calls each

// The 16-bit halves of `chunks` Philox calls, in order; writes up to kGroup - 1 calls more. Calls lie in
// 64-bit lanes, in the order 0 2 1 3, so that unpacking within 128 bits puts their words in order.
void philox_halves(const Names &names, uint64_t chunk, int64_t chunks, uint16_t *halves) {
  const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i direction = _mm256_set1_epi64x(int64_t(names.direction) << 16);
  __m256i keys[2 * kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys[2 * round] = _mm256_set1_epi64x(uint32_t(names.seed) + uint32_t(round) * kPhiloxW0);
    keys[2 * round + 1] = _mm256_set1_epi64x(uint32_t(names.seed >> 32) + uint32_t(round) * kPhiloxW1);
  }
  for (int64_t done = 0; done < chunks; done += kGroup) {
    __m256i x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      x0[u] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(chunk) + done + 4 * u), order);
      x1[u] = _mm256_or_si256(_mm256_srli_epi64(x0[u], 32), direction);
      x2[u] = _mm256_set1_epi64x(names.step);
      x3[u] = _mm256_set1_epi64x(names.tensor_id);
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round)
#pragma GCC unroll 2
      for (int u = 0; u < kVectors; ++u) { // the upper halves of lanes hold rubbish that nothing reads
        const __m256i p0 = _mm256_mul_epu32(x0[u], m0), p1 = _mm256_mul_epu32(x2[u], m1);
        const __m256i high0 = _mm256_srli_epi64(p0, 32), high1 = _mm256_srli_epi64(p1, 32);
        x0[u] = _mm256_xor_si256(_mm256_xor_si256(high1, x1[u]), keys[2 * round]);
        x2[u] = _mm256_xor_si256(_mm256_xor_si256(high0, x3[u]), keys[2 * round + 1]);
        x1[u] = p1;
        x3[u] = p0;
      }
    for (int u = 0; u < kVectors; ++u, halves += 32) {
      const __m256i a = _mm256_blend_epi32(x0[u], _mm256_slli_epi64(x1[u], 32), 0xAA);
      const __m256i b = _mm256_blend_epi32(x2[u], _mm256_slli_epi64(x3[u], 32), 0xAA);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(halves), _mm256_unpacklo_epi64(a, b));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(halves + 16), _mm256_unpackhi_epi64(a, b));
    }
  }
}

void widen_half(const uint16_t *in, int64_t count, float *out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(in + i))));
  for (; i < count; ++i)
    out[i] = _cvtsh_ss(in[i]);
}

void narrow_half(const float *in, int64_t count, uint16_t *out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i)
    out[i] = uint16_t(_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT));
}

#include "tiles.h"

} // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels *avx2_kernels() {
  static constexpr Kernels table = table_of("avx2");
  return &table;
}
#else
const Kernels *avx2_kernels() { return nullptr; }
#endif

} // namespace fogzo::cpu
