// The kernels for whatever the compiler's target is.
#include "outside.h"

namespace fogzo::cpu {
namespace {

constexpr int kWidth = 8;      // floats of a vector, where vectors are named
constexpr int64_t kGroup = 16; // Philox calls in flight

// The 16-bit halves of `chunks` Philox calls, in order; writes up to kGroup - 1 calls more. In 64-bit
// lanes, so that one multiply yields both halves of a product.
void philox_halves(const Names &names, uint64_t chunk, int64_t chunks, uint16_t *halves) {
  for (int64_t done = 0; done < chunks; done += kGroup, halves += 8 * kGroup) {
    uint64_t x0[kGroup], x1[kGroup], x2[kGroup], x3[kGroup];
    uint32_t k0 = uint32_t(names.seed), k1 = uint32_t(names.seed >> 32);
    for (int64_t l = 0; l < kGroup; ++l) {
      const uint64_t one = chunk + uint64_t(done + l);
      x0[l] = uint32_t(one);
      x1[l] = one >> 32 | names.direction << 16;
      x2[l] = names.step;
      x3[l] = names.tensor_id;
    }
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
      for (int64_t l = 0; l < kGroup; ++l) {
        const uint64_t p0 = (x0[l] & 0xFFFFFFFFu) * kPhiloxM0, p1 = (x2[l] & 0xFFFFFFFFu) * kPhiloxM1;
        x0[l] = (p1 >> 32) ^ (x1[l] & 0xFFFFFFFFu) ^ k0;
        x2[l] = (p0 >> 32) ^ (x3[l] & 0xFFFFFFFFu) ^ k1;
        x1[l] = p1;
        x3[l] = p0;
      }
    for (int64_t l = 0; l < kGroup; ++l) {
      const uint64_t words[4] = {x0[l], x1[l], x2[l], x3[l]};
      for (int w = 0; w < 4; ++w) {
        halves[8 * l + 2 * w] = uint16_t(words[w]);
        halves[8 * l + 2 * w + 1] = uint16_t(words[w] >> 16);
      }
    }
  }
}

using Half = torch::headeronly::Half;

void widen_half(const uint16_t *in, int64_t count, float *out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<float>(Half(in[i], Half::from_bits()));
}

void narrow_half(const float *in, int64_t count, uint16_t *out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = Half(in[i]).x;
}

#include "tiles.h"

void quantize_range(const Item &item, GridRange grid, float r, int64_t begin, int64_t end) {
  quantize_loops(item, grid, r, begin, end);
}

// after its loops over tiles
#include "cells.h"
// after the same
#include "hadamard.h"
// after the same
#include "learned.h"
// after all that it wraps
#include "rotated.h"

} // namespace

const Kernels *portable_kernels() {
  static constexpr Kernels table =
      table_of<perturb_range, estimate_range, update_range, learned_range>("portable");
  return &table;
}

} // namespace fogzo::cpu
