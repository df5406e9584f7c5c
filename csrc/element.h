// The contract per element: 16-bit half -> m -> v -> code, and -> G (docs/contract.md, sections 2
// and 4). Host and device; no torch. Every product and sum is written in the contract's order;
// compile with -ffp-contract=off so that only std::fma fuses.
#pragma once

#include "elementary.h"

namespace fogzo {

enum class Distribution { uniform, rademacher, triangular, logistic, gaussian };

// m of the even and the odd element of one Philox word.
struct Pair {
  float even, odd;
};

template <Distribution D> FOGZO_HD float noise_of_half(uint32_t k) {
  if (D == Distribution::uniform)
    return float(2 * int32_t(int16_t(k)) + 1);
  if (D == Distribution::rademacher)
    return k & 0x8000u ? -1.0f : 1.0f;
  if (D == Distribution::triangular)
    return float(int32_t(k & 0xFFu) + int32_t(k >> 8) - 255);
  return log_of((float(k) + 0.5f) / (65535.5f - float(k))); // logistic
}

template <Distribution D> FOGZO_HD Pair noise_of_word(uint32_t low, uint32_t high) {
  if (D == Distribution::gaussian) { // Box-Muller
    const float radius = std::sqrt(-2.0f * log_of((float(low) + 0.5f) / 65536.0f));
    float cosine, sine;
    cos_sin_pi(float(2 * int32_t(int16_t(high)) + 1) / 65536.0f, cosine, sine);
    return {radius * cosine, radius * sine};
  }
  return {noise_of_half<D>(low), noise_of_half<D>(high)};
}

// A grid without its step.
struct GridRange {
  float qmin, qmax, offset;
};

// What is constant over one tensor, row or group.
struct Scale {
  float delta, inv;
};

FOGZO_HD Scale make_scale(float alpha, float r) {
  const float delta = alpha * r;
  return {delta, 1.0f / delta};
}

// fma(gam, g, b m)
FOGZO_HD float direction_of(float gam, float g, float b, float m) { return std::fma(gam, g, b * m); }

// theta in units of delta, minus the grid's offset
FOGZO_HD float position_of(float theta, const Scale &scale, const GridRange &grid) {
  return std::fma(theta, scale.inv, -grid.offset);
}

// rint(min(max(y, qmin), qmax)); NaN gives qmin. The sum rounds half to even for abs(y) < 2^22.
FOGZO_HD float code_of(float y, const GridRange &grid) {
  const float low = y > grid.qmin ? y : grid.qmin;
  const float clamped = low < grid.qmax ? low : grid.qmax;
  return (clamped + 12582912.0f) - 12582912.0f;
}

FOGZO_HD float value_of(float code, const Scale &scale, const GridRange &grid) {
  return scale.delta * (code + grid.offset);
}

// fma(A, g, inv acc)
FOGZO_HD float estimate_of(float A, float g, float inv, float acc) { return std::fma(A, g, inv * acc); }

enum class Rule { adamw, sgd, momentum, nesterov };

// An optimizer's scalars, as the contract names them; of SGD, `decay` is keep.
struct Update {
  Rule rule;
  float size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay, momentum;
};

// theta after the step (docs/contract.md, section 4, the fused tail); state is updated in place
template <Rule R> FOGZO_HD float updated(const Update &u, float theta, float G, float &first, float &second) {
  if (R == Rule::adamw) {
    first = std::fma(u.first_weight, G - first, first);
    second = std::fma(u.second_weight * G, G, u.second_decay * second);
    const float ratio = first / std::fma(std::sqrt(second), u.root, u.eps);
    return std::fma(-u.size, ratio, u.decay * theta);
  }
  float d = std::fma(u.weight_decay, theta, G);
  if (R != Rule::sgd) {
    first = std::fma(u.decay, d, u.momentum * first);
    d = R == Rule::nesterov ? std::fma(u.momentum, first, d) : first;
  }
  return std::fma(-u.size, d, theta);
}

enum class StraightThrough { identity_clipped, identity, hardtanh, tanh, approxsign };

// h'(theta) (docs/contract.md, section 1); x = theta / alpha = r theta / delta
FOGZO_HD float derivative_of(StraightThrough kind, float theta, const Scale &scale, const GridRange &grid,
                             float r) {
  const float x = theta * scale.inv * r;
  switch (kind) {
  case StraightThrough::identity_clipped: {
    const float z = position_of(theta, scale, grid);
    return grid.qmin < z && z < grid.qmax ? 1.0f : 0.0f;
  }
  case StraightThrough::identity:
    return 1.0f;
  case StraightThrough::hardtanh:
    return std::fabs(x) < 1.0f ? 1.0f : 0.0f;
  case StraightThrough::tanh: { // 1 - tanh(x)^2, without its cancellation
    const float e = std::exp(-2.0f * std::fabs(x));
    return 4.0f * e / ((1.0f + e) * (1.0f + e));
  }
  default: { // approxsign
    const float slope = 2.0f - 2.0f * std::fabs(x);
    return slope > 0.0f ? slope : 0.0f;
  }
  }
}

} // namespace fogzo
