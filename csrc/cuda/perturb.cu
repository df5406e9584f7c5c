// The perturbation's launch. perturb_kernels.cu has its kernels.
#include "perturb.cuh"

namespace fogzo::cuda {

void perturb_quantize(const Where &where, const Plan &plan, const Dtypes &dtypes, bool plus, bool minus,
                      const Draw &draw, uint32_t direction, const float *norm, const Grid &grid, double epsilon,
                      int block) {
  const Step &step = draw.step;
  const bool both = plus && minus, plain = plan.per_tensor && !plan.shard && step.on_host();
  const float eps = float(epsilon);
  const Perturb p{tables_of(plan),
                  source_of(step),
                  mixing_of(step, draw.C, noise_factor(draw.distribution)),
                  norm,
                  direction,
                  direction_sign(uint64_t(step.seed.value), uint32_t(step.step.value), direction),
                  plus ? eps : -eps,
                  grid,
                  plus ? PLUS : MINUS,
                  dtypes};
  with_value(draw.distribution, [&](auto D) {
    if (block)
      return launch("rotated_perturb_kernel", rotated_perturb_for<decltype(D)::value>(dtypes, both, block),
                    where, plan.blocks, kThreads, Rotated<Perturb>{p, rotation_of(block)});
    launch("perturb_kernel", perturb_for<decltype(D)::value>(dtypes, both, plain), where, plan.blocks, kThreads,
           p);
  });
}

} // namespace fogzo::cuda
