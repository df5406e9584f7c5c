// Launches: on a given device and stream, with errors that name the kernel.
#pragma once

#include "hardware.cuh"
#include "ops.h"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace fogzo::cuda {

inline void check(cudaError_t status, const char *kernel) {
  if (status == cudaSuccess)
    return;
  int driver = 0;
  const bool none = status == cudaErrorNoDevice || (cudaDriverGetVersion(&driver) == cudaSuccess && !driver);
  throw std::runtime_error(std::string(kernel) + ": CUDA error " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status) + (none ? " (no CUDA device was found)" : ""));
}

// One launch of `blocks` blocks of `threads`; nothing for no blocks. The caller's own runtime has made
// the device current; this module's is a copy of its own, and is told as well.
template <class P>
void launch(const char *name, void (*kernel)(P), const Where &where, int64_t blocks, int threads,
            const std::remove_const_t<P> &parameters) {
  if (!blocks)
    return;
  check(cudaSetDevice(where.device), name);
  auto copy = parameters;
  void *arguments[] = {&copy};
  check(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(unsigned(blocks)),
                         dim3(unsigned(threads)), arguments, 0, reinterpret_cast<cudaStream_t>(where.stream)),
        name);
}

} // namespace fogzo::cuda
