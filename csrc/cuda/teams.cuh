// Teams of threads: a power of two of neighbours that reduce what belongs to one sum or one alpha.
#pragma once

#include "tiles.cuh"

namespace fogzo::cuda {

// Gives the first thread of a team the values of all, joined in an order that the team's size fixes; `join`
// must be commutative. Every thread of the block, which has `Threads`, must call it.
template <int Threads = kThreads, class Join> FOGZO_DEVICE double over_team(double x, int threads, Join join) {
#pragma unroll
  for (int bit = 1; bit < kWarp; bit *= 2)
    if (bit < threads)
      x = join(x, from_warp(x, bit));
  if (threads <= kWarp)
    return x;
  FOGZO_SHARED double of_warps[Threads / kWarp];
  barrier(); // until all threads have read what the last call wrote
  if (thread() % kWarp == 0)
    of_warps[thread() / kWarp] = x;
  barrier();
  if (thread() % threads == 0)
    for (int i = 1; i < threads / kWarp; ++i)
      x = join(x, of_warps[thread() / kWarp + i]);
  return x;
}

template <int Threads = kThreads> FOGZO_DEVICE double sum_over_team(double x, int threads) {
  return over_team<Threads>(x, threads, [](double a, double b) { return a + b; });
}

} // namespace fogzo::cuda
