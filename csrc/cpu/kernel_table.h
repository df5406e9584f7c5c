// All kernels of an instruction set.
#pragma once

#include "estimate.h"
#include "learned.h"
#include "perturb.h"
#include "statistics.h"

namespace fogzo::cpu {
namespace {

constexpr Kernels table_of(const char *isa) {
  return {isa,
          noise_range,
          sumsq_range,
          perturb_range,
          estimate_in_place,
          update_range,
          quantize_range,
          straight_through_range,
          measure_range,
          total_range,
          learned_range,
          hadamard_range};
}

} // namespace
} // namespace fogzo::cpu
