// The perturbation kernels with rademacher noise.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::rademacher>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
