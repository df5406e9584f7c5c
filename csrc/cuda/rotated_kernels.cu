// Kernels that draw the noise FOGZO_DISTRIBUTION, around a transform. The build compiles this file once for
// each distribution that names.h lists, side by side, as it does perturb_kernels.cu.
#include "rotated_estimate.cuh"
#include "rotated_perturb.cuh"
#include "rotated_tail.cuh"

namespace fogzo::cuda {

constexpr Distribution D = Distribution::FOGZO_DISTRIBUTION;

template RotatedPerturbKernel rotated_perturb_for<D>(const Dtypes &, bool, int);
template RotatedEstimateKernel rotated_estimate_for<D>(Dtype, int);
template RotatedTailKernel rotated_update_for<D>(bool);

} // namespace fogzo::cuda
