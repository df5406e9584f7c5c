// Logarithm, sine and cosine for any type F that bits_of(), float_of(), float_from() and fused() know: float,
// or vectors of it. Included within a namespace, after those functions; no include guard.

// ln x of a normal x > 0, within 1e-6 absolute for 2^-17 <= x <= 2^17: x = 2^e (1 + f) with
// sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f P(f). P in pairs of terms, since a chain of all of them would
// make a processor wait. F: float, or a vector of them.
template <class F> FOGZO_HD F log_of(F x) {
  const auto exponent = (bits_of(x) - 0x3F3504F3u) & 0xFF800000u; // e 2^23; less sqrt(1/2)
  const F f = float_of(bits_of(x) - exponent) - 1.0f, square = f * f;
  const F low = fused(square, fused(f, F{} - 0.24960495f, F{} + 0.33336114f),
                      fused(f, F{} - 0.50000633f, F{} + 0.99999983f));
  const F high = fused(square, fused(f, F{} - 0.10119296f, F{} + 0.16409985f),
                       fused(f, F{} - 0.17323389f, F{} + 0.19874425f));
  return fused(float_from(exponent), F{} + 8.2629582e-8f, f * fused(square * square, high, low)); // ln 2 / 2^23
}

// cos(pi t) and sin(pi t), abs(t) <= 1, each within 2e-7: with a = abs(t) - 1/2, -sin(pi a), which is a P(a^2),
// and cos(pi a) with the sign of t, which is t (1 - abs(t)) P(a^2). No quadrants; exact zeros stay exact.
template <class F> FOGZO_HD void cos_sin_pi(F t, F &cosine, F &sine) {
  const F size = float_of(bits_of(t) & 0x7FFFFFFFu), a = size - 0.5f, q = a * a;
  F c = fused(q, F{} - 0.07725966f, F{} + 0.59806888f);
  c = fused(c, q, F{} - 2.55003624f);
  c = fused(c, q, F{} + 5.16770727f);
  cosine = fused(c, q, F{} - 3.14159259f) * a;
  F s = fused(q, F{} - 0.21920221f, F{} + 1.27685569f);
  s = fused(s, q, F{} - 3.73916697f);
  sine = fused(s, q, F{} + 3.99999978f) * (t * (1.0f - size));
}
