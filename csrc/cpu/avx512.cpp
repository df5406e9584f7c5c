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

constexpr int kWidth = 16;                 // floats of a vector
constexpr int64_t kGroup = 16;             // Philox calls of a block
constexpr int kAtOnce = 4;                 // vectors of them that the registers hold
constexpr bool kFetchedWhileDrawn = false; // operands of perturb, see avx2.cpp; not measured here

enum class Narrow { any, finite, exact }; // what a number to be stored as bfloat16 may be

using F = __m512;
using H = __m512i;
using D = __m512d; // half as many doubles
typedef uint32_t U __attribute__((vector_size(64)));

using fogzo::bits_of;
using fogzo::float_from;
using fogzo::float_of;
using fogzo::fused;

inline F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline U bits_of(F x) { return U(x); }
inline F float_of(U bits) { return F(bits); }
inline F float_from(U k) { return _mm512_cvtepi32_ps(__m512i(k)); }
#include "../elementary_body.h"

inline F broadcast(float x) { return _mm512_set1_ps(x); }
inline F load_floats(const float *x) { return _mm512_loadu_ps(x); }
inline F larger(F a, F b) { return _mm512_max_ps(a, b); } // b where a is NaN
inline F smaller(F a, F b) { return _mm512_min_ps(a, b); }
inline F where_equal(F a, F b, F then, F otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, then);
}
inline F one_between(F x, F low, F high) { // 1 or 0
  return _mm512_maskz_mov_ps(
      _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, x, _CMP_LT_OQ), x, high, _CMP_LT_OQ),
      _mm512_set1_ps(1.0f));
}
inline F one_from_to(F x, F low, F high) { // 1 or 0
  return _mm512_maskz_mov_ps(
      _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, x, _CMP_LE_OQ), x, high, _CMP_LE_OQ),
      _mm512_set1_ps(1.0f));
}
inline D low_doubles(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline D high_doubles(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline F root(F x) { return _mm512_sqrt_ps(x); }
inline U words_of(H h) { return U(h); }
inline F rounded(F x) { return x + 12582912.0f - 12582912.0f; } // of codes: faster than vrndscaleps here

// element of the table at the index's lowest bits
inline F pick(F table, U index) { return _mm512_permutexvar_ps(__m512i(index), table); }

// (x & mask) | bits
inline U masked_or(U x, uint32_t mask, uint32_t bits) {
  return U(
      _mm512_ternarylogic_epi32(__m512i(x), _mm512_set1_epi32(int(mask)), _mm512_set1_epi32(int(bits)), 0xEA));
}

inline H byte_sums(H h) {
  const H bytes = _mm512_add_epi16(_mm512_and_si512(h, _mm512_set1_epi16(0xFF)), _mm512_srli_epi16(h, 8));
  return _mm512_sub_epi16(bytes, _mm512_set1_epi16(255));
}

// Words of a half in the upper 16 bits and `below` under it: the first and the last 16 elements.
inline void raise(H h, int16_t below, U &first, U &last) {
  const H under = _mm512_set1_epi16(below);
  first = U(_mm512_unpacklo_epi16(under, h));
  last = U(_mm512_unpackhi_epi16(under, h));
}

// Words of a half, zero-extended.
inline void extend(H h, U &first, U &last) {
  first = U(_mm512_unpacklo_epi16(h, _mm512_setzero_si512()));
  last = U(_mm512_unpackhi_epi16(h, _mm512_setzero_si512()));
}

// From one value of each for the even and the odd element of words_of(h).
inline void interleave(F even, F odd, F &first, F &last) {
  first = _mm512_unpacklo_ps(even, odd);
  last = _mm512_unpackhi_ps(even, odd);
}

// Values per chunk of a block, for vector `k` of it: 2 chunks a vector in order, 4 in pairs.
template <bool PAIRS> inline F spread(F chunks, int k) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = PAIRS ? _mm512_add_epi32(_mm512_srli_epi32(lane, 2), _mm512_set1_epi32(4 * (k / 2)))
                              : _mm512_add_epi32(_mm512_srli_epi32(lane, 3), _mm512_set1_epi32(2 * k));
  return _mm512_permutexvar_ps(index, chunks);
}

template <Dtype T> inline F load_as(const void *data, int64_t i) {
  if (T == Dtype::float32)
    return _mm512_loadu_ps(static_cast<const float *>(data) + i);
  const auto *halves = reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(data) + i);
  if (T == Dtype::float16)
    return _mm512_cvtph_ps(_mm256_loadu_si256(halves));
  return F(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(halves)), 16));
}

// bfloat16 in the upper 16 bits of each word, to nearest even; NaN stays NaN
template <Narrow N> inline U narrowed(F x) {
  if (N == Narrow::exact)
    return U(x);
  const U bits = U(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  if (N == Narrow::finite)
    return rounded;
  return U(_mm512_mask_mov_epi32(__m512i(rounded), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7FC00000)));
}

template <Dtype T, Narrow N> inline void store_as(void *data, int64_t i, F x) {
  if (T == Dtype::float32)
    return _mm512_storeu_ps(static_cast<float *>(data) + i, x);
  if (T == Dtype::int8)
    return _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<int8_t *>(data) + i),
                            _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  auto *halves = reinterpret_cast<__m256i *>(static_cast<uint16_t *>(data) + i);
  if (T == Dtype::float16)
    return _mm256_storeu_si256(halves, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(halves, _mm512_cvtepi32_epi16(_mm512_srli_epi32(__m512i(narrowed<N>(x)), 16)));
}

// Even and odd elements of kWidth words of two.
inline U load_words(const void *data, int64_t i) {
  return U(_mm512_loadu_si512(static_cast<const uint16_t *>(data) + i));
}
template <Dtype T, Narrow N> inline void store_pairs(void *data, int64_t i, F even, F odd) {
  if (T == Dtype::int8) {
    const __m512i low = _mm512_cvtps_epi32(even), high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 8);
    const __m512i codes = _mm512_ternarylogic_epi32(low, _mm512_set1_epi32(0xFF), high, 0xEA);
    return _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<int8_t *>(data) + i),
                               _mm512_cvtepi32_epi16(codes));
  }
  const __m512i low = _mm512_srli_epi32(__m512i(narrowed<N>(even)), 16);
  const __m512i high = __m512i(narrowed<N>(odd)), mask = _mm512_set1_epi32(int(0xFFFF0000u));
  _mm512_storeu_si512(static_cast<uint16_t *>(data) + i, _mm512_ternarylogic_epi32(high, mask, low, 0xEA));
}

// A key and a counter's fixed words, spread over vectors.
struct Keys {
  __m512i round[2 * kPhiloxRounds], direction, step, tensor_id;
};

inline void set_direction(Keys &keys, uint32_t direction) {
  keys.direction = _mm512_set1_epi64(int64_t(direction) << 16);
}

inline Keys keys_of(const Names &names) {
  Keys keys;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    keys.round[2 * i] = _mm512_set1_epi64(uint32_t(names.seed) + uint32_t(i) * kPhiloxW0);
    keys.round[2 * i + 1] = _mm512_set1_epi64(uint32_t(names.seed >> 32) + uint32_t(i) * kPhiloxW1);
  }
  set_direction(keys, names.direction);
  keys.step = _mm512_set1_epi64(names.step);
  keys.tensor_id = _mm512_set1_epi64(names.tensor_id);
  return keys;
}

struct Chunks { // the numbers of a block's chunks
  __m512i part[2];
};
template <bool PAIRS> inline Chunks chunks_from(uint64_t chunk) {
  const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  return {{_mm512_add_epi64(_mm512_set1_epi64(int64_t(chunk)), lane),
           _mm512_add_epi64(_mm512_set1_epi64(int64_t(chunk) + 8), lane)}};
}
template <bool PAIRS> inline Chunks load_chunks(const uint64_t *chunks) {
  return {{_mm512_loadu_si512(chunks), _mm512_loadu_si512(chunks + 8)}};
}

// The words of eight Philox calls. They lie in 64-bit lanes, so that one multiply yields both halves of a
// product; the upper halves of lanes hold rubbish that nothing reads.
struct Lanes {
  __m512i x0, x1, x2, x3;
};

inline __m512i plus(__m512i x, int64_t n) { return _mm512_add_epi64(x, _mm512_set1_epi64(n)); }
inline __m512i product(__m512i x, uint32_t m) { return _mm512_mul_epu32(x, _mm512_set1_epi64(m)); }
// a shuffle, since a shift would compete with the multiplies for a port
inline __m512i high_of(__m512i p) { return _mm512_shuffle_epi32(p, _MM_PERM_DDBB); }
inline __m512i exclusive_or(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }
inline __m512i exclusive_or(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

inline Lanes counters_of(const Keys &keys, __m512i chunk) {
  return {chunk, _mm512_or_si512(_mm512_srli_epi64(chunk, 32), keys.direction), keys.step, keys.tensor_id};
}

inline void in_this_order(__m512i, __m512i) {} // there are registers for any

// Halves of the calls, 32 elements a vector: in pairs as in memory, else 0-3, 16-19, 4-7, 20-23, ..., so that
// unpacking within 128 bits gives 16 elements in order.
template <bool PAIRS> inline void halves_of(const Lanes &w, H *halves) {
  const __m512i low =
      PAIRS ? _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0) : _mm512_set_epi64(11, 9, 3, 1, 10, 8, 2, 0);
  const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
  // elements 0-3 and 4-7 of each call
  const __m512i a = _mm512_mask_blend_epi32(0xAAAA, w.x0, _mm512_slli_epi64(w.x1, 32));
  const __m512i b = _mm512_mask_blend_epi32(0xAAAA, w.x2, _mm512_slli_epi64(w.x3, 32));
  halves[0] = _mm512_permutex2var_epi64(a, low, b);
  halves[1] = _mm512_permutex2var_epi64(a, high, b);
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

#include "vectors.h"
// after the noise that they draw
#include "tiles.h"
// after its loops over tiles
#include "cells.h"
// after the same
#include "hadamard.h"
// after the same
#include "learned.h"
// after what it falls back to
#include "fused.h"
// after its walks
#include "estimate_fused.h"
// after its loads of two vectors and its tables
#include "quantize_fused.h"
// after the same
#include "learned_fused.h"
// after all that it wraps
#include "rotated.h"

} // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels *avx512_kernels() {
  static constexpr Kernels table =
      table_of<perturb_fused, estimate_fused, update_fused, learned_fused>("avx512");
  return &table;
}
#else
const Kernels *avx512_kernels() { return nullptr; }
#endif

} // namespace fogzo::cpu
