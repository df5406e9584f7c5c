// Philox4x32-10 (Salmon et al., SC 2011; Random123) and what a stream of noise is a function of
// (docs/contract.md, section 2). Host and device; no torch.
#pragma once

#include "names.h"

#if defined(__CUDACC__)
#define FOGZO_HD __host__ __device__ __forceinline__
#else
#define FOGZO_HD inline
#endif

namespace fogzo {

struct Words {
  uint32_t x[4];
};

FOGZO_HD Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(c.x[0]) * kPhiloxM0, p1 = uint64_t(c.x[2]) * kPhiloxM1;
    c = {{uint32_t(p1 >> 32) ^ c.x[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.x[3] ^ k1, uint32_t(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// What a stream of noise is a function of, besides the element index.
struct Names {
  uint64_t seed;
  uint32_t step, direction, tensor_id;
};

FOGZO_HD Words noise_words(const Names &names, uint64_t chunk) {
  const Words counter{
      {uint32_t(chunk), uint32_t(chunk >> 32) | names.direction << 16, names.step, names.tensor_id}};
  return philox4x32(counter, uint32_t(names.seed), uint32_t(names.seed >> 32));
}

// s_i: -1 or +1.
FOGZO_HD float direction_sign(uint64_t seed, uint32_t step, uint32_t direction) {
  return noise_words({seed, step, direction, kSignTensorId}, 0).x[0] & 1 ? -1.0f : 1.0f;
}

} // namespace fogzo
