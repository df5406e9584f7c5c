// Vectors of kWidth floats: the type for all kernels, and operations for AVX2 (FOGZO_ISA 256) and AVX-512
// (512). What the two sets write differently comes before what they share. The portable kernels have FOGZO_ISA
// 0.
#pragma once

#include "prelude.h"

namespace fogzo::cpu {
namespace {

constexpr int kWidth = FOGZO_ISA ? FOGZO_ISA / 32 : 4;
constexpr int kBytes = 4 * kWidth;
typedef float F __attribute__((vector_size(kBytes)));
typedef int32_t I __attribute__((vector_size(kBytes)));

#if FOGZO_ISA
typedef double D __attribute__((vector_size(kBytes)));
typedef uint32_t U __attribute__((vector_size(kBytes)));    // words
typedef uint16_t H __attribute__((vector_size(kBytes)));    // halves
typedef uint64_t Wide __attribute__((vector_size(kBytes))); // lanes of Philox calls

constexpr int kAtOnce = FOGZO_ISA == 512 ? 4 : 3; // vectors of Philox calls that the registers hold

enum class Narrow { any, finite, exact }; // what a number to be stored as bfloat16 may be

// bfloat16 in the upper 16 bits of each word, to nearest even; NaN stays NaN
template <Narrow N> inline U narrowed(F x) {
  if (N == Narrow::exact)
    return U(x);
  const U bits = U(x), nearest = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return N == Narrow::finite ? nearest : x != x ? U{} + 0x7FC00000u : nearest;
}

#if FOGZO_ISA == 256
#define FOGZO_MM(name) _mm256_##name
using Raw = __m256i;
using RawHalf = __m128i;

inline F rounded(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline D low_doubles(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline D high_doubles(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

// element of the table at the index's lowest bits
inline F pick(F table, U index) { return _mm256_permutevar8x32_ps(table, Raw(index)); }

// (x & mask) | bits
inline U masked_or(U x, uint32_t mask, uint32_t bits) {
  if (bits && mask == 0xFFFF0000u)
    return U(_mm256_blend_epi16(_mm256_set1_epi32(int(bits)), Raw(x), 0xAA));
  return bits ? (x & mask) | bits : x & mask;
}

inline RawHalf pack(U halves) { // each less than 2^16
  return _mm_packus_epi32(_mm256_castsi256_si128(Raw(halves)), _mm256_extracti128_si256(Raw(halves), 1));
}
inline void store_codes(int8_t *out, F x) {
  const Raw codes = _mm256_cvtps_epi32(x);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_packs_epi16(halves, halves));
}
inline RawHalf paired_codes(U even, U odd) { return pack((even & 0xFFu) | ((odd & 0xFFu) << 8)); }

// The two as bfloat16, in words of two. The lower halves decide whether an upper one is raised, 16 bits at a
// time.
template <Narrow N> inline U narrowed_pairs(F even, F odd) {
  const bool nan = N == Narrow::any && _mm256_movemask_ps(_mm256_cmp_ps(even, odd, _CMP_UNORD_Q));
  const U x = nan ? narrowed<N>(even) : U(even), y = nan ? narrowed<N>(odd) : U(odd);
  const Raw upper = _mm256_blend_epi16(Raw(x >> 16), Raw(y), 0xAA);
  if (N == Narrow::exact || nan)
    return U(upper);
  const Raw lower = _mm256_blend_epi16(Raw(x), Raw(y << 16), 0xAA);
  const Raw even_upper = _mm256_andnot_si256(upper, _mm256_set1_epi16(1)); // then a tie raises nothing
  return U(_mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_subs_epu16(lower, even_upper), 15)));
}

inline Wide exclusive_or(Wide a, Wide b, Wide c) {
  Wide early = b ^ c;    // a comes last
  asm("" : "+x"(early)); // or the compiler sums it up in another order
  return a ^ early;
}
// Compilers would move instructions between calls until some wait in memory.
inline void in_this_order(Wide a, Wide b) { asm volatile("" : : "x"(a), "x"(b)); }

// Chunks in pairs lie in the order 0 2 1 3, for unpacking in halves_of().
template <bool PAIRS> inline Wide ordered(Wide chunks) {
  return PAIRS ? Wide(_mm256_permute4x64_epi64(Raw(chunks), 0xD8)) : chunks;
}

// From words 0 and 1 of each call in a, 2 and 3 in b: in pairs as in memory, else 0-3, 8-11, 4-7, 12-15, so
// that unpacking within 128 bits gives 8 elements in order.
template <bool PAIRS> inline void join_halves(Raw a, Raw b, H *halves) {
  halves[0] = H(PAIRS ? _mm256_unpacklo_epi64(a, b) : _mm256_permute2x128_si256(a, b, 0x20));
  halves[1] = H(PAIRS ? _mm256_unpackhi_epi64(a, b) : _mm256_permute2x128_si256(a, b, 0x31));
}
inline Raw odd_words(Wide even, Wide odd) { return _mm256_blend_epi32(Raw(even), Raw(odd << 32), 0xAA); }

#else
#define FOGZO_MM(name) _mm512_##name
using Raw = __m512i;
using RawHalf = __m256i;

inline F rounded(F x) { return x + 12582912.0f - 12582912.0f; } // of codes: faster than vrndscaleps here
inline D low_doubles(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline D high_doubles(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline F pick(F table, U index) { return _mm512_permutexvar_ps(Raw(index), table); }
inline U masked_or(U x, uint32_t mask, uint32_t bits) {
  return U(_mm512_ternarylogic_epi32(Raw(x), _mm512_set1_epi32(int(mask)), _mm512_set1_epi32(int(bits)), 0xEA));
}
inline RawHalf pack(U halves) { return _mm512_cvtepi32_epi16(Raw(halves)); }
inline void store_codes(int8_t *out, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline U selected(U x, uint32_t mask, U bits) { // (x & mask) | bits
  return U(_mm512_ternarylogic_epi32(Raw(x), _mm512_set1_epi32(int(mask)), Raw(bits), 0xEA));
}
inline RawHalf paired_codes(U even, U odd) { return pack(selected(even, 0xFFu, odd << 8)); }
template <Narrow N> inline U narrowed_pairs(F even, F odd) {
  return selected(narrowed<N>(odd), 0xFFFF0000u, narrowed<N>(even) >> 16);
}
inline Wide exclusive_or(Wide a, Wide b, Wide c) {
  return Wide(_mm512_ternarylogic_epi64(Raw(a), Raw(b), Raw(c), 0x96));
}
inline void in_this_order(Wide, Wide) {} // there are registers for any
template <bool PAIRS> inline Wide ordered(Wide chunks) { return chunks; }

// In pairs as in memory, else 0-3, 16-19, 4-7, 20-23, ..., as above.
template <bool PAIRS> inline void join_halves(Raw a, Raw b, H *halves) {
  const Raw low =
      PAIRS ? _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0) : _mm512_set_epi64(11, 9, 3, 1, 10, 8, 2, 0);
  halves[0] = H(_mm512_permutex2var_epi64(a, low, b));
  halves[1] = H(_mm512_permutex2var_epi64(a, _mm512_add_epi64(low, _mm512_set1_epi64(4)), b));
}
inline Raw odd_words(Wide even, Wide odd) { return _mm512_mask_blend_epi32(0xAAAA, Raw(even), Raw(odd << 32)); }
#endif

// ---- operations of formulas.h

using fogzo::bits_of, fogzo::float_from, fogzo::float_of, fogzo::fused, fogzo::larger, fogzo::rounded,
    fogzo::smaller;

inline F fused(F a, F b, F c) { return FOGZO_MM(fmadd_ps)(a, b, c); }
inline U bits_of(F x) { return U(x); }
inline F float_of(U bits) { return F(bits); }
inline F float_from(U k) { return FOGZO_MM(cvtepi32_ps)(Raw(k)); }
inline F larger(F a, F b) { return a > b ? a : b; }
inline F smaller(F a, F b) { return a < b ? a : b; }
inline F where_equal(F a, F b, F then, F otherwise) { return a == b ? then : otherwise; }
inline F open_indicator(F x, F low, F high) { return (low < x) & (x < high) ? F{} + 1.0f : F{}; }
inline F closed_indicator(F x, F low, F high) { return (low <= x) & (x <= high) ? F{} + 1.0f : F{}; }
#include "../formulas.h"

// ---- memory. Two vectors hold 2 kWidth neighbouring elements, in one of two orders. In order: the first
// kWidth, then the others. In pairs, for 16-bit operands: the even ones, then the odd ones, as they lie in
// words of two, so that neither noise nor operands are shuffled.

struct Two {
  F first, last;
};

template <class V> inline V read(const void *from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class V> inline void write(void *to, V vector) { std::memcpy(to, &vector, sizeof vector); }

inline F broadcast(float x) { return FOGZO_MM(set1_ps)(x); }

template <Dtype T> inline F load_as(const void *data, int64_t i) {
  if (T == Dtype::float32)
    return read<F>(static_cast<const float *>(data) + i);
  const RawHalf halves = read<RawHalf>(static_cast<const uint16_t *>(data) + i);
  if (T == Dtype::float16)
    return FOGZO_MM(cvtph_ps)(halves);
  return F(U(FOGZO_MM(cvtepu16_epi32)(halves)) << 16);
}

template <Dtype T, Narrow N> inline void store_as(void *data, int64_t i, F x) {
  if (T == Dtype::float32)
    return write(static_cast<float *>(data) + i, x);
  if (T == Dtype::int8)
    return store_codes(static_cast<int8_t *>(data) + i, x);
  write(static_cast<uint16_t *>(data) + i,
        T == Dtype::float16 ? FOGZO_MM(cvtps_ph)(x, _MM_FROUND_TO_NEAREST_INT) : pack(narrowed<N>(x) >> 16));
}

template <Dtype T, bool PAIRS> inline Two load_two(const void *data, int64_t i) {
  if (!PAIRS)
    return {load_as<T>(data, i), load_as<T>(data, i + kWidth)};
  const U words = read<U>(static_cast<const uint16_t *>(data) + i);
  return {float_of(words << 16), float_of(words & 0xFFFF0000u)};
}

template <Dtype T, bool PAIRS, Narrow N> inline void store_two(void *data, int64_t i, F first, F last) {
  if (PAIRS && T == Dtype::int8)
    return write(static_cast<int8_t *>(data) + i,
                 paired_codes(U(FOGZO_MM(cvtps_epi32)(first)), U(FOGZO_MM(cvtps_epi32)(last))));
  if (PAIRS)
    return write(static_cast<uint16_t *>(data) + i, narrowed_pairs<N>(first, last));
  store_as<T, N>(data, i, first);
  store_as<T, N>(data, i + kWidth, last);
}

template <Dtype... T> constexpr bool in_pairs(Dtype out) {
  return ((T == Dtype::bfloat16) && ...) && (out == Dtype::bfloat16 || out == Dtype::int8);
}

// 0, 1, ... kWidth - 1
inline U lane_numbers() {
  alignas(64) static constexpr uint32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return read<U>(numbers);
}

#endif
} // namespace
} // namespace fogzo::cpu
