// Logarithm, sine and cosine in float32, without branches, so that loops over them become vectors; the
// same bits on every instruction set. Polynomials: minimax fits; every bound below is for all arguments
// that noise has. Host and device; no torch.
#pragma once

#include "philox.h"

#include <cmath>
#include <cstring>

namespace fogzo {

FOGZO_HD uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FOGZO_HD float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Overloads for vectors stand beside the kernels that use them.
FOGZO_HD float fused(float a, float b, float c) { return std::fma(a, b, c); }
FOGZO_HD float float_from(uint32_t k) { return float(int32_t(k)); } // as a signed number

#include "elementary_body.h"

} // namespace fogzo
