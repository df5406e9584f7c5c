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

constexpr int kWidth = 8;                 // floats of a vector
constexpr int64_t kGroup = 8;             // Philox calls of a block
constexpr int kAtOnce = 3;                // vectors of them that the registers hold
constexpr bool kFetchedWhileDrawn = true; // float32 operands of perturb; a tenth faster from memory on Zen

enum class Narrow { any, finite, exact }; // what a number to be stored as bfloat16 may be

using F = __m256;
using H = __m256i;
using D = __m256d; // half as many doubles
typedef uint32_t U __attribute__((vector_size(32)));

using fogzo::bits_of;
using fogzo::float_from;
using fogzo::float_of;
using fogzo::fused;

inline F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline U bits_of(F x) { return U(x); }
inline F float_of(U bits) { return F(bits); }
inline F float_from(U k) { return _mm256_cvtepi32_ps(__m256i(k)); }
#include "../elementary_body.h"

inline F broadcast(float x) { return _mm256_set1_ps(x); }
inline F load_floats(const float *x) { return _mm256_loadu_ps(x); }
inline F larger(F a, F b) { return _mm256_max_ps(a, b); } // b where a is NaN
inline F smaller(F a, F b) { return _mm256_min_ps(a, b); }
inline F where_equal(F a, F b, F then, F otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline F one_between(F x, F low, F high) { // 1 or 0
  return _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(low, x, _CMP_LT_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ)),
                       _mm256_set1_ps(1.0f));
}
inline F one_from_to(F x, F low, F high) { // 1 or 0
  return _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(low, x, _CMP_LE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ)),
                       _mm256_set1_ps(1.0f));
}
inline D low_doubles(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline D high_doubles(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline F root(F x) { return _mm256_sqrt_ps(x); }
inline U words_of(H h) { return U(h); }
inline F rounded(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// element of the table at the index's lowest bits
inline F pick(F table, U index) { return _mm256_permutevar8x32_ps(table, __m256i(index)); }

// (x & mask) | bits
inline U masked_or(U x, uint32_t mask, uint32_t bits) {
  if (bits && mask == 0xFFFF0000u)
    return U(_mm256_blend_epi16(_mm256_set1_epi32(int(bits)), __m256i(x), 0xAA));
  return bits ? (x & mask) | bits : x & mask;
}

inline H byte_sums(H h) {
  const H bytes = _mm256_add_epi16(_mm256_and_si256(h, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(h, 8));
  return _mm256_sub_epi16(bytes, _mm256_set1_epi16(255));
}

// Words of a half in the upper 16 bits and `below` under it: the first and the last 8 elements.
inline void raise(H h, int16_t below, U &first, U &last) {
  const H under = _mm256_set1_epi16(below);
  first = U(_mm256_unpacklo_epi16(under, h));
  last = U(_mm256_unpackhi_epi16(under, h));
}

// Words of a half, zero-extended.
inline void extend(H h, U &first, U &last) {
  first = U(_mm256_unpacklo_epi16(h, _mm256_setzero_si256()));
  last = U(_mm256_unpackhi_epi16(h, _mm256_setzero_si256()));
}

// From one value of each for the even and the odd element of words_of(h).
inline void interleave(F even, F odd, F &first, F &last) {
  first = _mm256_unpacklo_ps(even, odd);
  last = _mm256_unpackhi_ps(even, odd);
}

template <Dtype T> inline F load_as(const void *data, int64_t i) {
  if (T == Dtype::float32)
    return _mm256_loadu_ps(static_cast<const float *>(data) + i);
  const auto *halves = reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(data) + i);
  if (T == Dtype::float16)
    return _mm256_cvtph_ps(_mm_loadu_si128(halves));
  return F(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves)), 16));
}

// bfloat16 in the upper 16 bits of each word, to nearest even; NaN stays NaN
template <Narrow N> inline U narrowed(F x) {
  if (N == Narrow::exact)
    return U(x);
  const U bits = U(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  if (N == Narrow::finite)
    return rounded;
  return U(_mm256_blendv_epi8(__m256i(rounded), _mm256_set1_epi32(0x7FC00000),
                              _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))));
}

template <Dtype T, Narrow N> inline void store_as(void *data, int64_t i, F x) {
  if (T == Dtype::float32)
    return _mm256_storeu_ps(static_cast<float *>(data) + i, x);
  if (T == Dtype::int8) {
    const __m256i codes = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    return _mm_storel_epi64(reinterpret_cast<__m128i *>(static_cast<int8_t *>(data) + i),
                            _mm_packs_epi16(words, words));
  }
  auto *halves = reinterpret_cast<__m128i *>(static_cast<uint16_t *>(data) + i);
  if (T == Dtype::float16)
    return _mm_storeu_si128(halves, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  const __m256i kept = __m256i(narrowed<N>(x) >> 16);
  _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
}

// The two as bfloat16, in words of two. The lower halves decide whether an upper one is raised, 16 bits at a
// time.
template <Narrow N> inline H narrowed_pairs(F even, F odd) {
  const bool nan = N == Narrow::any && _mm256_movemask_ps(_mm256_cmp_ps(even, odd, _CMP_UNORD_Q));
  const F x = nan ? float_of(narrowed<N>(even)) : even, y = nan ? float_of(narrowed<N>(odd)) : odd;
  const H upper = _mm256_blend_epi16(H(bits_of(x) >> 16), H(y), 0xAA);
  if (N == Narrow::exact || nan)
    return upper;
  const H lower = _mm256_blend_epi16(H(x), H(bits_of(y) << 16), 0xAA);
  const H even_upper = _mm256_andnot_si256(upper, _mm256_set1_epi16(1)); // then a tie raises nothing
  return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_subs_epu16(lower, even_upper), 15));
}

// Even and odd elements of kWidth words of two.
inline U load_words(const void *data, int64_t i) {
  return U(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(data) + i)));
}
template <Dtype T, Narrow N> inline void store_pairs(void *data, int64_t i, F even, F odd) {
  if (T == Dtype::int8) {
    const U codes = (U(_mm256_cvtps_epi32(even)) & 0xFFu) | ((U(_mm256_cvtps_epi32(odd)) & 0xFFu) << 8);
    const __m128i low = _mm256_castsi256_si128(__m256i(codes)),
                  high = _mm256_extracti128_si256(__m256i(codes), 1);
    return _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<int8_t *>(data) + i),
                            _mm_packus_epi32(low, high));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<uint16_t *>(data) + i),
                      narrowed_pairs<N>(even, odd));
}

// Values per chunk of a block, for vector `k` of it: 1 chunk a vector in order, 2 in pairs.
template <bool PAIRS> inline F spread(F chunks, int k) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_permutevar8x32_ps(chunks,
                                  PAIRS ? _mm256_add_epi32(_mm256_srli_epi32(lane, 2), _mm256_set1_epi32(k))
                                        : _mm256_set1_epi32(k));
}

// A key and a counter's fixed words, spread over vectors.
struct Keys {
  __m256i round[2 * kPhiloxRounds], direction, step, tensor_id;
};

inline void set_direction(Keys &keys, uint32_t direction) {
  keys.direction = _mm256_set1_epi64x(int64_t(direction) << 16);
}

inline Keys keys_of(const Names &names) {
  Keys keys;
  for (int i = 0; i < kPhiloxRounds; ++i) {
    keys.round[2 * i] = _mm256_set1_epi64x(uint32_t(names.seed) + uint32_t(i) * kPhiloxW0);
    keys.round[2 * i + 1] = _mm256_set1_epi64x(uint32_t(names.seed >> 32) + uint32_t(i) * kPhiloxW1);
  }
  set_direction(keys, names.direction);
  keys.step = _mm256_set1_epi64x(names.step);
  keys.tensor_id = _mm256_set1_epi64x(names.tensor_id);
  return keys;
}

// The numbers of a block's chunks; in pairs in the order 0 2 1 3, for unpacking in halves_of().
struct Chunks {
  __m256i part[2];
};
template <bool PAIRS> inline Chunks chunks_from(uint64_t chunk) {
  const __m256i lane = PAIRS ? _mm256_set_epi64x(3, 1, 2, 0) : _mm256_set_epi64x(3, 2, 1, 0);
  const __m256i first = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(chunk)), lane);
  return {{first, _mm256_add_epi64(first, _mm256_set1_epi64x(4))}};
}
template <bool PAIRS> inline Chunks load_chunks(const uint64_t *chunks) {
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(chunks));
  const __m256i last = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(chunks + 4));
  if (!PAIRS)
    return {{first, last}};
  return {{_mm256_permute4x64_epi64(first, 0xD8), _mm256_permute4x64_epi64(last, 0xD8)}};
}

// The words of four Philox calls. They lie in 64-bit lanes, so that one multiply yields both halves of a
// product; the upper halves of lanes hold rubbish that nothing reads.
struct Lanes {
  __m256i x0, x1, x2, x3;
};

inline __m256i plus(__m256i x, int64_t n) { return _mm256_add_epi64(x, _mm256_set1_epi64x(n)); }
inline __m256i product(__m256i x, uint32_t m) { return _mm256_mul_epu32(x, _mm256_set1_epi64x(m)); }
inline __m256i high_of(__m256i p) { return _mm256_shuffle_epi32(p, 0xF5); }
inline __m256i exclusive_or(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }
inline __m256i exclusive_or(__m256i a, __m256i b, __m256i c) {
  __m256i early = _mm256_xor_si256(b, c); // a comes last
  asm("" : "+x"(early));                  // or the compiler sums it up in another order
  return _mm256_xor_si256(a, early);
}

inline Lanes counters_of(const Keys &keys, __m256i chunk) {
  return {chunk, _mm256_or_si256(_mm256_srli_epi64(chunk, 32), keys.direction), keys.step, keys.tensor_id};
}

// Compilers would move instructions between calls until some wait in memory.
inline void in_this_order(__m256i a, __m256i b) { asm volatile("" : : "x"(a), "x"(b)); }

// Halves of the calls, 16 elements a vector: in pairs as in memory, else 0-3, 8-11, 4-7, 12-15, so that
// unpacking within 128 bits gives 8 elements in order.
template <bool PAIRS> inline void halves_of(const Lanes &w, H *halves) {
  const __m256i a = _mm256_blend_epi32(w.x0, _mm256_slli_epi64(w.x1, 32), 0xAA); // elements 0-3 of each call
  const __m256i b = _mm256_blend_epi32(w.x2, _mm256_slli_epi64(w.x3, 32), 0xAA);
  halves[0] = PAIRS ? _mm256_unpacklo_epi64(a, b) : _mm256_permute2x128_si256(a, b, 0x20);
  halves[1] = PAIRS ? _mm256_unpackhi_epi64(a, b) : _mm256_permute2x128_si256(a, b, 0x31);
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

const Kernels *avx2_kernels() {
  static constexpr Kernels table = table_of<perturb_fused, estimate_fused, update_fused, learned_fused>("avx2");
  return &table;
}
#else
const Kernels *avx2_kernels() { return nullptr; }
#endif

} // namespace fogzo::cpu
