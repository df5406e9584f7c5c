// Noise on the device: round keys, Philox words, m of a word's two elements (docs/contract.md, section 2).
#pragma once

#include "hardware.cuh"
#include "ops.h"

namespace fogzo::cuda {

// The key of each Philox round. As part of a kernel's parameters they lie in constant memory, which an
// instruction reads as an operand: no key schedule in the loop, and no registers.
struct Keys {
  uint32_t k[2 * kPhiloxRounds];
};

FOGZO_HD Keys round_keys(uint64_t seed) {
  Keys keys;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    keys.k[2 * round] = k0;
    keys.k[2 * round + 1] = k1;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return keys;
}

// Names of noise as a kernel gets them: those of the host, or where they lie in device memory.
struct Source {
  Keys keys;
  const int64_t *seed_at, *step_at;
  uint32_t step;
};

inline Source source_of(const Step &step) {
  return {round_keys(uint64_t(step.seed.value)), step.seed.at, step.step.at, uint32_t(step.step.value)};
}

// Plain: the step's scalars come from the host, and the keys stay in constant memory.
template <bool Plain> FOGZO_DEVICE Keys keys_of(const Source &source) {
  return Plain || !source.seed_at ? source.keys : round_keys(uint64_t(*source.seed_at));
}

template <bool Plain> FOGZO_DEVICE uint32_t step_of(const Source &source) {
  return Plain || !source.step_at ? source.step : uint32_t(*source.step_at);
}

FOGZO_DEVICE Words words_of(int64_t chunk, uint32_t direction, uint32_t step, uint32_t tensor_id,
                            const Keys &keys) {
  uint32_t c0 = uint32_t(chunk), c1 = uint32_t(uint64_t(chunk) >> 32) | direction << 16;
  uint32_t c2 = step, c3 = tensor_id;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(c0) * kPhiloxM0, p1 = uint64_t(c2) * kPhiloxM1;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ keys.k[2 * round];
    c2 = uint32_t(p0 >> 32) ^ c3 ^ keys.k[2 * round + 1];
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
  }
  return {{c0, c1, c2, c3}};
}

// 2^15 (2 ks + 1) of the word's upper half: one signed conversion
FOGZO_DEVICE float high_uniform(uint32_t word) { return float(int32_t(permute(word, 0x8000u, 0x3254))); }

FOGZO_DEVICE float exponent_set(uint32_t half) { return float_of(half | 0x4B000000u); } // 2^23 + half

// log2((k + 0.5) / (65535.5 - k)) of 2^23 + k; every sum is exact
FOGZO_DEVICE float logistic_log2(float k) {
  const float numerator = k - 8388607.5f;
  return fast_log2(numerator * fast_rcp(65536.0f - numerator));
}

// pair(): m times the factor, of the even and the odd element of a word; the coefficient of the noise is
// divided by the factor.
template <Distribution D> struct Scaled;

template <> struct Scaled<Distribution::uniform> {
  static constexpr double factor = 32768.0;
  static FOGZO_DEVICE Pair pair(uint32_t word) {
    return {float(int32_t((word << 16) + 0x8000u)), high_uniform(word)};
  }
};

template <> struct Scaled<Distribution::rademacher> {
  static constexpr double factor = 1.0;
  static FOGZO_DEVICE Pair pair(uint32_t word) {
    return {float_of(((word << 16) & 0x80000000u) | 0x3F800000u), float_of((word & 0x80000000u) | 0x3F800000u)};
  }
};

template <> struct Scaled<Distribution::triangular> {
  static constexpr double factor = 1.0;
  static FOGZO_DEVICE Pair pair(uint32_t word) {
    return {float(weigh_bytes(word, 0x00000101u, -255)), float(weigh_bytes(word, 0x01010000u, -255))};
  }
};

template <> struct Scaled<Distribution::logistic> {
  static constexpr double factor = 1.4426950408889634; // 1 / ln 2
  static FOGZO_DEVICE Pair pair(uint32_t word) {
    return {logistic_log2(exponent_set(word & 0xFFFFu)), logistic_log2(exponent_set(word >> 16))};
  }
};

template <> struct Scaled<Distribution::gaussian> {
  static constexpr double factor = 1.0;
  // Box-Muller: -2 ln x = -2 ln 2 log2 x; the angle is pi 2^-31 times 2^15 (2 ks + 1)
  static FOGZO_DEVICE Pair pair(uint32_t word) {
    const float x = (exponent_set(word & 0xFFFFu) - 8388607.5f) * (1.0f / 65536.0f);
    const float radius = fast_sqrt(fast_log2(x) * -1.3862943611198906f);
    float cosine, sine;
    fast_cos_sin(high_uniform(word) * 1.4629180792671596e-09f, cosine, sine);
    return {radius * cosine, radius * sine};
  }
};

// Of the chunk's 8 elements, in order.
template <Distribution D> FOGZO_DEVICE void scaled_noise(const Words &words, float (&m)[kChunk]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Pair pair = Scaled<D>::pair(words.x[i]);
    m[2 * i] = pair.even;
    m[2 * i + 1] = pair.odd;
  }
}

// Of one element, by a Philox call of its own: for tails and tensors that are not aligned.
template <Distribution D>
FOGZO_DEVICE float scaled_element(int64_t e, uint32_t direction, uint32_t step, uint32_t tensor_id,
                                  const Keys &keys) {
  const Words words = words_of(e >> 3, direction, step, tensor_id, keys);
  const uint32_t low = e & 2 ? words.x[1] : words.x[0], high = e & 2 ? words.x[3] : words.x[2];
  const Pair pair = Scaled<D>::pair(e & 4 ? high : low);
  return e & 1 ? pair.odd : pair.even;
}

FOGZO_DEVICE float sign_of(uint32_t direction, uint32_t step, const Keys &keys) {
  return words_of(0, direction, step, kSignTensorId, keys).x[0] & 1 ? -1.0f : 1.0f;
}

// float32 of sqrt(beta), and of sqrt(1 - beta) C over the noise's factor.
struct Mixing {
  float guide, noise;
};

// As a kernel gets them: from the host, or to be made of 1 - beta in device memory.
struct MixingSource {
  const double *one_minus_beta_at;
  double scale;
  Mixing mixing;
};

inline MixingSource mixing_of(const Step &step, double C, double factor) {
  const double one_minus_beta = step.one_minus_beta.at ? 0.0 : step.one_minus_beta.value, scale = C / factor;
  return {step.one_minus_beta.at,
          scale,
          {float(std::sqrt(1.0 - one_minus_beta)), float(std::sqrt(one_minus_beta) * scale)}};
}

template <bool Plain> FOGZO_DEVICE Mixing read_mixing(const MixingSource &source) {
  if (Plain || !source.one_minus_beta_at)
    return source.mixing;
  const double one_minus_beta = *source.one_minus_beta_at;
  return {float(std::sqrt(1.0 - one_minus_beta)), float(std::sqrt(one_minus_beta) * source.scale)};
}

// numerator / N, or 0 unless N is finite and > 0
FOGZO_DEVICE float over_norm(float numerator, float norm) {
  return norm > 0.0f && norm < INFINITY ? numerator / norm : 0.0f;
}

} // namespace fogzo::cuda
