// Teams of threads: a power of two of neighbours that take together what belongs together.
#pragma once

#include "tiles.cuh"

namespace fogzo::cuda {

struct Plus {
  FOGZO_DEVICE double operator()(double a, double b) const { return a + b; }
};

// What the team's threads hold, joined in an order that is fixed by its size; for the first of them alone.
// `join` does not care which comes first. Every thread of the block, which has `Threads`, must come here.
template <int Threads = kThreads, class Join> FOGZO_DEVICE double over_team(double x, int threads, Join join) {
#pragma unroll
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (bit < threads)
      x = join(x, from_warp(x, bit));
  if (threads <= kWarp)
    return x;
  FOGZO_SHARED double held[Threads / kWarp];
  barrier(); // until nobody reads what the call before this one left
  if (thread() % kWarp == 0)
    held[thread() / kWarp] = x;
  barrier();
  if (thread() % threads == 0)
    for (int i = 1; i < threads / kWarp; ++i)
      x = join(x, held[thread() / kWarp + i]);
  return x;
}

} // namespace fogzo::cuda
