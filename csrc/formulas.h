// Formulas for any type F that bits_of(), float_of(), float_from(), fused(), larger(), smaller(), rounded(),
// where_equal(), open_indicator() and closed_indicator() know: float, or vectors of floats. A namespace
// includes this file after these functions, so there is no include guard.

// ln x of a normal x > 0, within 1e-6 absolute for 2^-17 <= x <= 2^17: x = 2^e (1 + f) with
// sqrt(1/2) <= 1 + f < sqrt(2), ln(1 + f) = f P(f). Pairs of terms shorten the chain that a processor waits
// for.
template <class F> FOGZO_HD F log_of(F x) {
  const auto exponent = (bits_of(x) - 0x3F3504F3u) & 0xFF800000u; // e 2^23; less sqrt(1/2)
  const F f = float_of(bits_of(x) - exponent) - 1.0f, square = f * f;
  const F low = fused(square, fused(f, F{} - 0.24960495f, F{} + 0.33336114f),
                      fused(f, F{} - 0.50000633f, F{} + 0.99999983f));
  const F high = fused(square, fused(f, F{} - 0.10119296f, F{} + 0.16409985f),
                       fused(f, F{} - 0.17323389f, F{} + 0.19874425f));
  return fused(float_from(exponent), F{} + 8.2629582e-8f, f * fused(square * square, high, low)); // ln 2 / 2^23
}

// cos(pi t) and sin(pi t), abs(t) <= 1, each within 2e-7: with a = abs(t) - 1/2, -sin(pi a) = a P(a^2), and
// cos(pi a) with the sign of t = t (1 - abs(t)) P(a^2). Exact zeros stay exact.
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

// A grid without its step.
template <class F> struct GridOf {
  F qmin, qmax, offset;
};

// The step of a tensor, row or group, and its inverse.
template <class F> struct ScaleOf {
  F delta, inv;
};

// v = fma(gam, g, b m)
template <class F> FOGZO_HD F direction_of(F gam, F g, F b, F m) { return fused(gam, g, b * m); }

// z: theta in units of delta, minus the grid's offset
template <class F> FOGZO_HD F position_of(F theta, const ScaleOf<F> &scale, const GridOf<F> &grid) {
  return fused(theta, scale.inv, -grid.offset);
}

// y = fma(eps, v, z): where a probe rounds theta
template <class F> FOGZO_HD F probe_of(F eps, F v, F z) { return fused(eps, v, z); }

// min(max(y, qmin), qmax); NaN gives qmin
template <class F> FOGZO_HD F clamped_of(F y, const GridOf<F> &grid) {
  return smaller(larger(y, grid.qmin), grid.qmax);
}

template <class F> FOGZO_HD F code_of(F y, const GridOf<F> &grid) { return rounded(clamped_of(y, grid)); }

// fma(A, g, inv acc)
template <class F> FOGZO_HD F estimate_of(F A, F g, F inv, F acc) { return fused(A, g, inv * acc); }

// The forms of h' that are 1 or 0
template <StraightThrough S>
constexpr bool has_indicator = S == StraightThrough::identity || S == StraightThrough::identity_clipped ||
                               S == StraightThrough::identity_trust;

// h'(theta) of such a form, at the position of theta
template <StraightThrough S, class F> FOGZO_HD F indicator_of(F z, const GridOf<F> &grid) {
  if constexpr (S == StraightThrough::identity_clipped)
    return open_indicator(z, grid.qmin, grid.qmax);
  else if constexpr (S == StraightThrough::identity_trust) // a code is at most half a delta away
    return closed_indicator(z, grid.qmin - 0.5f, grid.qmax + 0.5f);
  else
    return F{} + 1.0f;
}

// dQ/dalpha (docs/contract.md, section 4, learned scales) at the position of theta; only the sign grid has r
// = 2.
template <class F> FOGZO_HD F alpha_slope_of(F z, const GridOf<F> &grid, float r) {
  const F clamped = clamped_of(z, grid), shift = r * grid.offset;
  return fused(F{} + r, rounded(clamped), r == 1.0f ? where_equal(z, clamped, -z, shift) : shift); // exact
}
