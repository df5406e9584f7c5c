// The perturbation kernels with logistic noise.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::logistic>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
