// The perturbation kernels with triangular noise.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::triangular>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
