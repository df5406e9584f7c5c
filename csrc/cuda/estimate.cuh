// What the kernels of the estimate are told, and what is constant over a block.
#pragma once

#include "hadamard.cuh"
#include "noise.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct Estimate {
  Tables tables;
  Source source;
  const float *coefficients;
  int directions;
  float r;
  int64_t *counters;
  Dtype dtype;
};

struct EstimateNames {
  Keys keys;
  uint32_t step, tensor_id;
  float A;
  const float *B;
};

template <bool Plain> FOGZO_DEVICE EstimateNames estimate_names(const Estimate &p, const Part &part) {
  return {keys_of<Plain>(p.source), step_of<Plain>(p.source), uint32_t(part[TENSOR_ID]), p.coefficients[0],
          p.coefficients + kEstimateCoefficients};
}

using RotatedEstimateKernel = void (*)(Rotated<Estimate>);

// The kernel around a transform (rotated_estimate.cuh).
template <Distribution D> RotatedEstimateKernel rotated_estimate_for(Dtype grad, int block);

#define FOGZO_ELSEWHERE(name, ...)                                                                             \
  extern template RotatedEstimateKernel rotated_estimate_for<Distribution::name>(Dtype, int);
FOGZO_DISTRIBUTIONS(FOGZO_ELSEWHERE)
#undef FOGZO_ELSEWHERE

} // namespace fogzo::cuda
