// The kernels for AVX-512 (F, BW, DQ, VL).
#include "outside.h"

namespace fogzo::cpu {

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))),      \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace {

constexpr int64_t kGroup = 16; // Philox calls in flight
constexpr int kVectors = 2;    // of eight calls each

// The 16-bit halves of `chunks` Philox calls, in order; writes up to kGroup - 1 calls more. Calls lie in
// 64-bit lanes, in the order 0 4 1 5 2 6 3 7, so that unpacking within 128 bits puts their words in order.
void philox_halves(const Names &names, uint64_t chunk, int64_t chunks, uint16_t *halves) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i direction = _mm512_set1_epi64(int64_t(names.direction) << 16);
  __m512i keys[2 * kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys[2 * round] = _mm512_set1_epi64(uint32_t(names.seed) + uint32_t(round) * kPhiloxW0);
    keys[2 * round + 1] = _mm512_set1_epi64(uint32_t(names.seed >> 32) + uint32_t(round) * kPhiloxW1);
  }
  for (int64_t done = 0; done < chunks; done += kGroup) {
    __m512i x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      x0[u] = _mm512_add_epi64(_mm512_set1_epi64(int64_t(chunk) + done + 8 * u), order);
      x1[u] = _mm512_or_si512(_mm512_srli_epi64(x0[u], 32), direction);
      x2[u] = _mm512_set1_epi64(names.step);
      x3[u] = _mm512_set1_epi64(names.tensor_id);
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round)
#pragma GCC unroll 2
      for (int u = 0; u < kVectors; ++u) { // the upper halves of lanes hold rubbish that nothing reads
        const __m512i p0 = _mm512_mul_epu32(x0[u], m0), p1 = _mm512_mul_epu32(x2[u], m1);
        const __m512i high0 = _mm512_srli_epi64(p0, 32), high1 = _mm512_srli_epi64(p1, 32);
        x0[u] = _mm512_ternarylogic_epi64(high1, x1[u], keys[2 * round], 0x96); // a ^ b ^ c
        x2[u] = _mm512_ternarylogic_epi64(high0, x3[u], keys[2 * round + 1], 0x96);
        x1[u] = p1;
        x3[u] = p0;
      }
    for (int u = 0; u < kVectors; ++u, halves += 64) {
      const __m512i a = _mm512_mask_blend_epi32(0xAAAA, x0[u], _mm512_slli_epi64(x1[u], 32));
      const __m512i b = _mm512_mask_blend_epi32(0xAAAA, x2[u], _mm512_slli_epi64(x3[u], 32));
      _mm512_storeu_si512(halves, _mm512_unpacklo_epi64(a, b));
      _mm512_storeu_si512(halves + 32, _mm512_unpackhi_epi64(a, b));
    }
  }
}

void widen_half(const uint16_t *in, int64_t count, float *out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(in + i))));
  for (; i < count; ++i)
    out[i] = _cvtsh_ss(in[i]);
}

void narrow_half(const float *in, int64_t count, uint16_t *out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
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

const Kernels *avx512_kernels() {
  static constexpr Kernels table = table_of("avx512", perturb_range, estimate_range);
  return &table;
}
#else
const Kernels *avx512_kernels() { return nullptr; }
#endif

} // namespace fogzo::cpu
