// The perturbation kernels with uniform noise.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::uniform>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
