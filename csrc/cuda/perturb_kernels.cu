// The perturbation's kernels with the noise FOGZO_DISTRIBUTION. The build compiles this file once for each
// distribution that names.h lists, side by side: no other file takes as long.
#include "perturb.cuh"

namespace fogzo::cuda {

template PerturbKernel perturb_for<Distribution::FOGZO_DISTRIBUTION>(const Dtypes &, bool, bool);

} // namespace fogzo::cuda
