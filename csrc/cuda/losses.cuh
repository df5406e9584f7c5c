// The coefficients A and B_i of the estimate, from the losses (docs/contract.md, sections 4 and 5): for
// one thread, in float64.
#pragma once

#include "noise.cuh"

namespace fogzo::cuda {

struct LossesSource {
  Source source;
  Losses losses;
  Scalar<double> one_minus_beta;
  double scale; // C over the noise's factor
};

inline LossesSource losses_of(const Draw &draw, const Losses &losses) {
  return {source_of(draw.step), losses, draw.step.one_minus_beta, draw.C / noise_factor(draw.distribution)};
}

struct Coefficients {
  float A;
  bool usable;    // some direction counts
  bool norm_lost; // N is not finite
};

template <class T> FOGZO_DEVICE T read(const Scalar<T> &scalar) {
  return scalar.at ? *scalar.at : scalar.value;
}

// Writes the B_i and adds to the counters.
FOGZO_DEVICE Coefficients read_losses(const LossesSource &p, float *B) {
  const Losses &losses = p.losses;
  const Keys keys = keys_of<false>(p.source);
  const uint32_t step = step_of<false>(p.source);
  const double one_minus_beta = read(p.one_minus_beta), n = double(losses.n);
  const double guide = std::sqrt(1.0 - one_minus_beta), noise = std::sqrt(one_minus_beta) * p.scale;
  double sum = 0.0;
  int64_t lost = 0;
#pragma unroll 1
  for (int64_t i = 0; i < losses.n; ++i) {
    double c = (double(losses.plus[i]) - double(losses.minus[i])) / (2.0 * losses.epsilon);
    if (!(std::fabs(float(c)) < INFINITY)) {
      c = 0.0;
      ++lost;
    }
    sum += c * sign_of(uint32_t(i), step, keys);
    B[i] = float(c * noise / n);
  }
  const float norm = *losses.norm;
  const bool norm_lost = losses.n && !(std::fabs(norm) < INFINITY);
  if (losses.counters) {
    losses.counters[0] += lost;
    losses.counters[1] += norm_lost;
  }
  const float A = norm > 0.0f && norm < INFINITY ? float(sum * guide / n / norm) : 0.0f;
  return {A, lost < losses.n && !norm_lost, norm_lost};
}

} // namespace fogzo::cuda
