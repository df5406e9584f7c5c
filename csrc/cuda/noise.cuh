// Noise on the device: round keys, Philox words, m of a word's two elements (docs/contract.md, section 2).
#pragma once

#include "tiles.cuh"

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

// Seed and step as a kernel gets them: from the host, or as addresses in device memory.
struct Source {
  Keys keys;
  const int64_t *seed_at, *step_at;
  uint32_t step;
};

inline Source source_of(const Draw &draw) {
  return {round_keys(uint64_t(draw.seed.value)), draw.seed.at, draw.step.at, uint32_t(draw.step.value)};
}

// What noise is a function of, but for chunk and direction.
struct Names {
  Keys keys;
  uint32_t step, tensor_id;
};

// Plain: seed and step come from the host, and the keys stay in constant memory.
template <bool Plain> FOGZO_DEVICE Names names_of(const Source &source, uint32_t tensor_id) {
  return {Plain || !source.seed_at ? source.keys : round_keys(uint64_t(*source.seed_at)),
          Plain || !source.step_at ? source.step : uint32_t(*source.step_at), tensor_id};
}

template <bool Plain> FOGZO_DEVICE Names names_of(const Source &source, const Part &part) {
  return names_of<Plain>(source, uint32_t(part[TENSOR_ID]));
}

FOGZO_DEVICE Words words_of(int64_t chunk, uint32_t direction, const Names &names) {
  uint32_t c0 = uint32_t(chunk), c1 = uint32_t(uint64_t(chunk) >> 32) | direction << 16;
  uint32_t c2 = names.step, c3 = names.tensor_id;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(c0) * kPhiloxM0, p1 = uint64_t(c2) * kPhiloxM1;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ names.keys.k[2 * round];
    c2 = uint32_t(p0 >> 32) ^ c3 ^ names.keys.k[2 * round + 1];
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
  }
  return {{c0, c1, c2, c3}};
}

// Gives 2^15 (2 ks + 1) of the word's upper half by one signed conversion.
FOGZO_DEVICE float high_uniform(uint32_t word) { return float(int32_t(permute(word, 0x8000u, 0x3254))); }

FOGZO_DEVICE float exponent_set(uint32_t half) { return float_of(half | 0x4B000000u); } // 2^23 + half

// Gives log2((k + 0.5) / (65535.5 - k)) of 2^23 + k; every sum is exact.
FOGZO_DEVICE float logistic_log2(float k) {
  const float numerator = k - 8388607.5f;
  return fast_log2(numerator * fast_rcp(65536.0f - numerator));
}

// pair() gives m times the factor of the even and the odd element of a word. The caller divides the coefficient
// of the noise by the factor.
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
    const float angle = high_uniform(word) * 1.4629180792671596e-09f;
    return {radius * fast_cos(angle), radius * fast_sin(angle)};
  }
};

// Writes the scaled m of a chunk, or of one element: then the chunk's Philox call serves one element alone.
template <Distribution D, class Items>
FOGZO_DEVICE void scaled_noise(const Items &at, int k, uint32_t direction, const Names &names,
                               float (&m)[Items::size]) {
  const int64_t number = at.number(k);
  if constexpr (Items::size == 1) {
    const Words words = words_of(number >> 3, direction, names);
    const uint32_t low = number & 2 ? words.x[1] : words.x[0], high = number & 2 ? words.x[3] : words.x[2];
    const Pair pair = Scaled<D>::pair(number & 4 ? high : low);
    m[0] = number & 1 ? pair.odd : pair.even;
  } else {
    const Words words = words_of(number, direction, names);
    unrolled<kChunk / 2>([&](int i) {
      const Pair pair = Scaled<D>::pair(words.x[i]);
      m[2 * i] = pair.even;
      m[2 * i + 1] = pair.odd;
    });
  }
}

// Adds sum_i B_i t m_i to x.
template <Distribution D, class Items>
FOGZO_DEVICE void add_noise(const Items &at, const Names &names, const float *B, float t, int directions,
                            float (&x)[Items::count][Items::size]) {
#pragma unroll 1
  for (int i = 0; i < directions; ++i) {
    const float b = *global(B + i) * t;
    unrolled<Items::count>([&](int k) {
      float m[Items::size];
      scaled_noise<D>(at, k, uint32_t(i), names, m);
      unrolled<Items::size>([&](int j) { x[k][j] = std::fma(b, m[j], x[k][j]); });
    });
  }
}

// Gives the sign of a direction, which is noise of a reserved tensor.
FOGZO_DEVICE float sign_of(uint32_t direction, Names names) {
  names.tensor_id = kSignTensorId;
  return words_of(0, direction, names).x[0] & 1 ? -1.0f : 1.0f;
}

// Gives C over the noise's factor.
double noise_scale(const Draw &draw);

} // namespace fogzo::cuda
