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

// ln x of a normal x > 0, within 1e-6 absolute for 2^-17 <= x <= 2^17: x = 2^e (1 + f) with
// sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f - f^2 / 2 + f^3 P(f).
FOGZO_HD float log_of(float x) {
  const uint32_t shifted = bits_of(x) - 0x3F3504F3u; // less sqrt(1/2)
  const int32_t e = int32_t(shifted) >> 23;
  const float f = float_of((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 0.06746601f;
  p = std::fma(p, f, -0.11675641f);
  p = std::fma(p, f, 0.11888175f);
  p = std::fma(p, f, -0.12405591f);
  p = std::fma(p, f, 0.14219551f);
  p = std::fma(p, f, -0.16667996f);
  p = std::fma(p, f, 0.20002119f);
  p = std::fma(p, f, -0.25000009f);
  p = std::fma(p, f, 0.33333313f);
  const float square = f * f, tail = std::fma(square * f, p, -0.5f * square);
  const float scaled = float(e);
  // ln 2 in two parts: the first has so few bits that its product with e is exact
  return std::fma(scaled, 0.693359375f, f + std::fma(scaled, -2.12194440e-4f, tail));
}

// cos(pi t) and sin(pi t), abs(t) <= 1, each within 2e-7: by the quadrant j and what is left of 2 t.
FOGZO_HD void cos_sin_pi(float t, float &cosine, float &sine) {
  const float x = 2.0f * t, shifted = x + 12582912.0f; // 1.5 * 2^23: the low bits become rint(x)
  const uint32_t j = bits_of(shifted);
  const float r = x - (shifted - 12582912.0f), q = r * r;
  float s = 1.5820673e-4f;
  s = std::fma(s, q, -4.6812664e-3f);
  s = std::fma(s, q, 7.9692578e-2f);
  s = std::fma(s, q, -6.4596409e-1f);
  s = std::fma(s, q, 1.5707964f) * r;
  float c = 9.0402161e-4f;
  c = std::fma(c, q, -2.0860288e-2f);
  c = std::fma(c, q, 2.5366923e-1f);
  c = std::fma(c, q, -1.2337005f);
  c = std::fma(c, q, 1.0f);
  const uint32_t odd = 0u - (j & 1u), cosine_bits = bits_of(c), sine_bits = bits_of(s);
  cosine = float_of(((cosine_bits & ~odd) | (sine_bits & odd)) ^ (((j + 1u) & 2u) << 30));
  sine = float_of(((sine_bits & ~odd) | (cosine_bits & odd)) ^ ((j & 2u) << 30));
}

} // namespace fogzo
