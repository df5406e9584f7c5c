// The perturbation kernels with gaussian noise.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::gaussian>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
