// The coefficients A and B_i of the estimate, from the losses (docs/contract.md, sections 4 and 5), and the
// scalars of the optimizer's step: one thread, in float64.
#include "launch.cuh"
#include "noise.cuh"

namespace fogzo::cuda {

struct Coefficients {
  Source source;
  Mix mix;
  Losses losses;
  double scale; // C over the noise's factor
  bool update;
  Optimizer optimizer;
  float *out;
};

template <class T> FOGZO_DEVICE T read(const Scalar<T> &scalar) {
  return scalar.at ? *scalar.at : scalar.value;
}

// Writes A and the B_i, and counts the directions and norms that are lost. Guided noise has one B.
FOGZO_DEVICE void write_estimate(const Coefficients &p) {
  const Losses &losses = p.losses;
  const Names names = names_of<false>(p.source, kSignTensorId);
  const double one_minus_beta = read(p.mix.one_minus_beta), n = double(losses.n);
  const double guide = std::sqrt(1.0 - one_minus_beta), noise = std::sqrt(one_minus_beta) * p.scale;
  const float norm = *p.mix.norm;
  const bool norm_lost = !(std::fabs(norm) < INFINITY);
  double sum = 0.0;
  int64_t lost = 0;
  if (losses.guided) // c = N, and s = 1
    p.out[kCoefficients] = float(double(norm) * noise);
#pragma unroll 1
  for (int64_t i = 0; i < losses.n; ++i) {
    double c = (double(losses.plus[i]) - double(losses.minus[i])) / (2.0 * double(p.mix.epsilon));
    if (!(std::fabs(float(c)) < INFINITY)) {
      c = 0.0;
      ++lost;
    }
    sum += c * sign_of(uint32_t(i), names);
    p.out[kCoefficients + i] = float(c * noise / n);
  }
  if (losses.counters) {
    losses.counters[0] += lost;
    losses.counters[1] += norm_lost;
  }
  const double A = losses.guided ? guide : sum * guide / n / norm;
  p.out[A_AT] = norm > 0.0f && norm < INFINITY ? float(A) : 0.0f;
  p.out[NOISE_AT] = (losses.guided || lost < losses.n) && !norm_lost ? 1.0f : 0.0f;
  p.out[SKIP_AT] = norm_lost ? 1.0f : 0.0f;
}

FOGZO_KERNEL(1, 1) coefficients_kernel(FOGZO_PARAMETER Coefficients p) {
  if (p.losses.n || p.losses.guided) {
    write_estimate(p);
  } else {
    p.out[A_AT] = 1.0f;
    p.out[NOISE_AT] = p.out[SKIP_AT] = 0.0f;
  }
  if (!p.update)
    return;
  const Optimizer &o = p.optimizer;
  const double lr = read(o.lr), count = double(read(o.count));
  p.out[SIZE_AT] = step_size(o.rule, o.hyperparameters, lr, count);
  p.out[DECAY_AT] = step_decay(o.rule, o.hyperparameters, lr, count);
  p.out[ROOT_AT] = step_root(o.rule, o.hyperparameters, count);
}

void write_coefficients(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses,
                        const Optimizer *optimizer, float *coefficients) {
  launch("coefficients_kernel", coefficients_kernel, call.where, 1,
         Coefficients{source_of(draw), mix, losses, noise_scale(draw), optimizer != nullptr,
                      optimizer ? *optimizer : Optimizer{}, coefficients},
         1);
}

} // namespace fogzo::cuda
