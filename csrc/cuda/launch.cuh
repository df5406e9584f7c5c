// Launches: which kernel serves the dtypes, on a given device and stream, with errors that name the kernel.
#pragma once

#include "tiles.cuh"

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

// Launches `blocks` blocks of `threads`, or nothing if there are no blocks. The caller's runtime has made the
// device current; this module has a runtime of its own, which must be told as well.
template <class P>
void launch(const char *name, void (*kernel)(P), const Where &where, int64_t blocks,
            const std::remove_const_t<P> &parameters, int threads = kThreads) {
  if (!blocks)
    return;
  check(cudaSetDevice(where.device), name);
  auto copy = parameters;
  void *arguments[] = {&copy};
  check(cudaLaunchKernel(reinterpret_cast<const void *>(kernel), dim3(unsigned(blocks)),
                         dim3(unsigned(threads)), arguments, 0, reinterpret_cast<cudaStream_t>(where.stream)),
        name);
}

using Float32 = Same<Dtype::float32>;
using Bfloat16 = Same<Dtype::bfloat16>;
using Float16 = Same<Dtype::float16>;
using MixedBfloat16 = Types<Dtype::float32, Dtype::bfloat16, Dtype::bfloat16>; // with float32 latents
using Any = Same<Dtype::any>;

// Gives f(T()) for the first T of the list that fits the operands' dtypes; `Any` fits all.
template <class First, class... Rest, class F> auto with_dtypes(const Dtypes &dtypes, F f) {
  if (First::fits(dtypes))
    return f(First());
  if constexpr (sizeof...(Rest) > 0)
    return with_dtypes<Rest...>(dtypes, f);
  else
    throw std::logic_error("with_dtypes() must have a kernel for each triple of dtypes");
}

// Launches the kernel that `kernel_of` gives for the first T of the list that fits, over the call's plan.
template <class... T, class P, class F>
void launch_for(const char *name, const Call &call, const Dtypes &dtypes, const P &parameters, F kernel_of) {
  launch(name, with_dtypes<T...>(dtypes, kernel_of), call.where, call.plan.blocks, parameters);
}

// Gives f(std::true_type()) or f(std::false_type()).
template <class F> auto with_flag(bool flag, F f) { return flag ? f(std::true_type()) : f(std::false_type()); }

// Whether the fast kernels serve: one alpha for each tensor, no shard of several rows, no noise per tensor, and
// scalars on the host.
inline bool is_plain(const Plan &plan, bool on_host) { return plan.per_tensor && !plan.shard && on_host; }

} // namespace fogzo::cuda
