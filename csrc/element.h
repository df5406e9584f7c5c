// The contract per element: 16-bit half -> m -> v -> code, and -> G (docs/contract.md, sections 2
// and 4). Host and device; no torch. Every product and sum is written in the contract's order;
// compile with -ffp-contract=off so that only std::fma fuses.
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

// Operations of formulas.h on one float; cpu/vector.h has the same on vectors.
FOGZO_HD float fused(float a, float b, float c) { return std::fma(a, b, c); }
FOGZO_HD float float_from(uint32_t k) { return float(int32_t(k)); } // as a signed number
FOGZO_HD float larger(float a, float b) { return a > b ? a : b; }   // b where a is NaN
FOGZO_HD float smaller(float a, float b) { return a < b ? a : b; }
FOGZO_HD float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; } // half to even, abs(x) < 2^22
FOGZO_HD float where_equal(float a, float b, float then, float otherwise) { return a == b ? then : otherwise; }
FOGZO_HD float open_indicator(float x, float low, float high) { return low < x && x < high ? 1.0f : 0.0f; }
FOGZO_HD float closed_indicator(float x, float low, float high) { return low <= x && x <= high ? 1.0f : 0.0f; }

#include "formulas.h"

using GridRange = GridOf<float>;
using Scale = ScaleOf<float>;

// m of the even and the odd element of one Philox word.
struct Pair {
  float even, odd;
};

// m of an element, of a distribution whose m is a function of the element's half
template <Distribution D> FOGZO_HD float noise_of_half(uint32_t k) {
  if constexpr (D == Distribution::uniform)
    return float(2 * int32_t(int16_t(k)) + 1);
  else if constexpr (D == Distribution::rademacher)
    return k & 0x8000u ? -1.0f : 1.0f;
  else if constexpr (D == Distribution::triangular)
    return float(int32_t(k & 0xFFu) + int32_t(k >> 8) - 255);
  else if constexpr (D == Distribution::logistic)
    return log_of((float(k) + 0.5f) / (65535.5f - float(k)));
  else
    static_assert(unknown<D>, "noise_of_half() must know each distribution that is drawn from a half");
}

// m of the two elements of a word, of the gaussian distribution alone: Box-Muller
FOGZO_HD Pair noise_of_word(uint32_t low, uint32_t high) {
  const float radius = std::sqrt(-2.0f * log_of((float(low) + 0.5f) / 65536.0f));
  float cosine, sine;
  cos_sin_pi(float(2 * int32_t(int16_t(high)) + 1) / 65536.0f, cosine, sine);
  return {radius * cosine, radius * sine};
}

FOGZO_HD Scale make_scale(float alpha, float r) {
  const float delta = alpha * r;
  return {delta, 1.0f / delta};
}

FOGZO_HD float value_of(float code, const Scale &scale, const GridRange &grid) {
  return scale.delta * (code + grid.offset);
}

// One of the Hadamard transform, in place.
FOGZO_HD void butterfly(float &a, float &b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// What makes the transform of a block orthonormal.
FOGZO_HD constexpr float hadamard_factor(int block) {
  float factor = 1.0f; // block^(-1/2): exact but for the root of 1/2
  for (; block >= 4; block /= 4)
    factor *= 0.5f;
  return block == 2 ? factor * 0.70710678118654752f : factor;
}

// An optimizer's scalars, as the contract names them; of SGD, `decay` is keep.
struct Update {
  Rule rule;
  float size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay, momentum;
};

// Those that stay from step to step.
inline Update update_of(Rule rule, const Hyperparameters &h) {
  Update u{rule, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  switch (rule) {
  case Rule::adamw:
    u.first_weight = float(1.0 - h.beta1);
    u.second_weight = float(1.0 - h.beta2);
    u.second_decay = float(h.beta2);
    u.eps = float(h.eps);
    return u;
  case Rule::sgd:
  case Rule::momentum:
  case Rule::nesterov:
    u.weight_decay = float(h.weight_decay);
    u.momentum = float(h.momentum);
    return u;
  }
  throw std::logic_error("update_of() must know each rule");
}

// Those of the optimizer's step number `count`; without branches, as a GPU has them.
static_assert(kCount<Rule> == 4, "these must know each rule: AdamW's, or else one of SGD's");

FOGZO_HD float step_size(Rule rule, const Hyperparameters &h, double lr, double count) {
  return float(rule == Rule::adamw ? lr / (1.0 - std::pow(h.beta1, count)) : lr);
}

FOGZO_HD float step_decay(Rule rule, const Hyperparameters &h, double lr, double count) {
  return float(rule == Rule::adamw ? 1.0 - lr * h.weight_decay : count == 1.0 ? 1.0 : 1.0 - h.dampening);
}

FOGZO_HD float step_root(Rule rule, const Hyperparameters &h, double count) {
  return rule == Rule::adamw ? float(1.0 / std::sqrt(1.0 - std::pow(h.beta2, count))) : 0.0f;
}

// theta after the step (docs/contract.md, section 4, the fused tail); state is updated in place
template <Rule R> FOGZO_HD float updated(const Update &u, float theta, float G, float &first, float &second) {
  if constexpr (R == Rule::adamw) {
    first = std::fma(u.first_weight, G - first, first);
    second = std::fma(u.second_weight * G, G, u.second_decay * second);
    const float ratio = first / std::fma(std::sqrt(second), u.root, u.eps);
    return std::fma(-u.size, ratio, u.decay * theta);
  } else {
    float d = std::fma(u.weight_decay, theta, G);
    if constexpr (R == Rule::momentum || R == Rule::nesterov) {
      first = std::fma(u.decay, d, u.momentum * first);
      d = R == Rule::nesterov ? std::fma(u.momentum, first, d) : first;
    } else {
      static_assert(R == Rule::sgd || unknown<R>, "updated() must know each rule");
    }
    return std::fma(-u.size, d, theta);
  }
}

// h'(theta) (docs/contract.md, section 1); x = theta / alpha = r theta / delta
template <StraightThrough S>
FOGZO_HD float derivative_of(float theta, const Scale &scale, const GridRange &grid, float r) {
  const float x = theta * scale.inv * r;
  if constexpr (has_indicator<S>) {
    return indicator_of<S>(position_of(theta, scale, grid), grid);
  } else if constexpr (S == StraightThrough::hardtanh) {
    return std::fabs(x) < 1.0f ? 1.0f : 0.0f;
  } else if constexpr (S == StraightThrough::tanh) { // 1 - tanh(x)^2, without its cancellation
    const float e = std::exp(-2.0f * std::fabs(x));
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  } else if constexpr (S == StraightThrough::approxsign) {
    const float slope = 2.0f - 2.0f * std::fabs(x);
    return slope > 0.0f ? slope : 0.0f;
  } else {
    static_assert(unknown<S>, "derivative_of() must know each form of the derivative");
  }
}

// How a statistic of a cell, the elements that share an alpha, becomes the alpha.
struct Measure {
  Statistic statistic;
  float factor, add, least;
};

// What a cell comes to is a float64: a sum, or of absmax the largest bits of abs(x) as a number. Those of NaN
// are larger than infinity's, so that no NaN is lost.
template <Statistic S> FOGZO_HD double joined(double a, double b) {
  return S == Statistic::absmax ? (a > b ? a : b) : a + b;
}

// `count` may be 0
template <Statistic S> FOGZO_HD float statistic_of(double total, int64_t count) {
  const double mean = total / double(count ? count : 1);
  if constexpr (S == Statistic::absmax)
    return float_of(uint32_t(total));
  else if constexpr (S == Statistic::absmean)
    return float(mean);
  else if constexpr (S == Statistic::rms)
    return float(std::sqrt(mean));
  else
    static_assert(unknown<S>, "statistic_of() must know each statistic");
}

// max(factor (statistic + add), least); NaN stays
FOGZO_HD float alpha_of(float statistic, const Measure &measure) {
  const float scaled = measure.factor * (statistic + measure.add);
  return scaled < measure.least ? measure.least : scaled;
}

} // namespace fogzo
