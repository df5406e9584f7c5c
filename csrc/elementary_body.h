// Logarithm, sine and cosine for any type F that bits_of(), float_of(), fused() and exponent_of() know:
// float, or vectors of it. Included within a namespace, after those functions; no include guard.

// ln x of a normal x > 0, within 1e-6 absolute for 2^-17 <= x <= 2^17: x = 2^e (1 + f) with
// sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f - f^2 / 2 + f^3 P(f). F: float, or a vector of them.
template <class F> FOGZO_HD F log_of(F x) {
  const auto shifted = bits_of(x) - 0x3F3504F3u; // less sqrt(1/2)
  const F e = exponent_of(shifted), f = float_of((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  F p = fused(f, F{} + 0.06746601f, F{} - 0.11675641f);
  p = fused(p, f, F{} + 0.11888175f);
  p = fused(p, f, F{} - 0.12405591f);
  p = fused(p, f, F{} + 0.14219551f);
  p = fused(p, f, F{} - 0.16667996f);
  p = fused(p, f, F{} + 0.20002119f);
  p = fused(p, f, F{} - 0.25000009f);
  p = fused(p, f, F{} + 0.33333313f);
  const F square = f * f, tail = fused(square * f, p, square * -0.5f);
  // ln 2 in two parts: the first has so few bits that its product with e is exact
  return fused(e, F{} + 0.693359375f, f + fused(e, F{} - 2.12194440e-4f, tail));
}

// cos(pi t) and sin(pi t), abs(t) <= 1, each within 2e-7: by the quadrant j and what is left of 2 t.
template <class F> FOGZO_HD void cos_sin_pi(F t, F &cosine, F &sine) {
  const F x = t * 2.0f, shifted = x + 12582912.0f; // 1.5 * 2^23: the low bits become rint(x)
  const auto j = bits_of(shifted);
  const F r = x - (shifted - 12582912.0f), q = r * r;
  F s = fused(q, F{} + 1.5820673e-4f, F{} - 4.6812664e-3f);
  s = fused(s, q, F{} + 7.9692578e-2f);
  s = fused(s, q, F{} - 6.4596409e-1f);
  s = fused(s, q, F{} + 1.5707964f) * r;
  F c = fused(q, F{} + 9.0402161e-4f, F{} - 2.0860288e-2f);
  c = fused(c, q, F{} + 2.5366923e-1f);
  c = fused(c, q, F{} - 1.2337005f);
  c = fused(c, q, F{} + 1.0f);
  const auto odd = 0u - (j & 1u), cosine_bits = bits_of(c), sine_bits = bits_of(s);
  cosine = float_of(((cosine_bits & ~odd) | (sine_bits & odd)) ^ (((j + 1u) & 2u) << 30));
  sine = float_of(((sine_bits & ~odd) | (cosine_bits & odd)) ^ ((j & 2u) << 30));
}
