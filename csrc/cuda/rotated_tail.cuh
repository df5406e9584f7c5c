// The fused tail around transforms: noise is rotated back, and the stored latent is rotated for the next Q.
// Dtypes, and the size of a block, are told when it runs. For those distributions that rotated_kernels.cu
// compiles.
#pragma once

#include "tail.cuh"

namespace fogzo::cuda {

// A chunk's step, given its rotated noise in x; then x is the latent as it is stored.
template <bool Adamw, bool Aligned>
FOGZO_DEVICE void rotated_step(const Tail &p, const Part &part, const TailNames &names, int c,
                               float (&x)[kChunk]) {
  const bool has_first = Adamw || names.update.rule != Rule::sgd;
  char *weight = part.address(names.master ? MINUS : LATENT, bytes_of(names.theta_t));
  char *latent = part.address(LATENT, bytes_of(names.latent_t));
  char *first_at = part.address(STATE_1, 4), *second_at = part.address(STATE_2, 4);
  float theta[kChunk], g[kChunk], first[kChunk] = {}, second[kChunk] = {};
  load_widened<Aligned>(names.skip ? latent : weight, c, names.skip ? names.latent_t : names.theta_t, theta);
  if (!names.skip) {
    load_widened<Aligned>(part.address(GRAD, bytes_of(names.grad_t)), c, names.grad_t, g);
    if (has_first)
      load_widened<Aligned>(first_at, c, Dtype::float32, first);
    if (Adamw)
      load_widened<Aligned>(second_at, c, Dtype::float32, second);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float G = names.noisy ? std::fma(names.A, g[i], x[i]) : g[i];
      theta[i] = stepped<Adamw>(names.update, theta[i], G, first[i], second[i]);
    }
    store_chunk<Aligned>(weight, c, theta, names.theta_t);
    if (names.master)
      store_chunk<Aligned>(latent, c, theta, names.latent_t);
    if (has_first)
      store_chunk<Aligned>(first_at, c, first, Dtype::float32);
    if (Adamw)
      store_chunk<Aligned>(second_at, c, second, Dtype::float32);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] = stored(theta[i], names.latent_t);
}

// A tensor with an alpha.
template <Distribution D, bool Adamw, bool Aligned>
FOGZO_DEVICE void rotated_update(const Rotated<Tail> &p, const Part &part, const TailNames &names) {
  const int half = p.rotation.half, chunks = all_chunks(part);
  const Layout layout = layout_of<false>(part);
  const Scales scales = scales_of<false>(part, p.op.grid.r);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kPairs) {
    const TwoChunks c = two_chunks(p.rotation, turn, chunks);
    const Scale scale = chunk_scale<false>(scales, c.first); // of both: a block has one
    float x[2][kChunk] = {};
    if (names.noisy) {
      const int64_t chunk = chunk_number<false>(layout, c.first);
      sum_noise<D, false>(p.op, names, chunk, x[0]);
      sum_noise<D, false>(p.op, names, chunk + half, x[1]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x[0][i] *= scale.inv;
        x[1][i] *= scale.inv;
      }
      rotate<true>(x, p.rotation);
    }
    if (c.some) { // else the block's first chunk, which its own thread may be writing
      rotated_step<Adamw, Aligned>(p.op, part, names, c.first, x[0]);
      rotated_step<Adamw, Aligned>(p.op, part, names, c.second, x[1]);
    }
    if (!p.op.quantized)
      continue;
    rotate<true>(x, p.rotation);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[0][i] = position(x[0][i], scale.inv, p.op.grid);
      x[1][i] = position(x[1][i], scale.inv, p.op.grid);
    }
    if (c.some) {
      char *out = part.address(PLUS, bytes_of(names.out_t));
      store_quantized<Aligned>(out, c.first, x[0], scale.delta, p.op.grid, names.out_t);
      store_quantized<Aligned>(out, c.second, x[1], scale.delta, p.op.grid, names.out_t);
    }
  }
}

template <Distribution D, bool Adamw>
FOGZO_KERNEL(kThreads, 3)
rotated_update_kernel(FOGZO_PARAMETER Rotated<Tail> p) {
  constexpr Dtype any = Dtype::any;
  const Part part = part_of(p.op.tables);
  const TailNames names = tail_names<false, any, any, any>(p.op, part);
  if (names.quantized) {
    if (part.aligned())
      rotated_update<D, Adamw, true>(p, part, names);
    else
      rotated_update<D, Adamw, false>(p, part, names);
    return count_bad_alphas<false>(p.op.counters, part);
  }
  const Layout layout = layout_of<false>(part);
  const int chunks = part.chunks();
#pragma unroll 1
  for (int c = thread(); c < chunks; c += kThreads)
    update_chunk<D, Adamw, false, false>(p.op, part, names, layout, Scales{}, c);
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads)
    update_element<D, Adamw>(p.op, part, names, j);
}

template <Distribution D> RotatedTailKernel rotated_update_for(bool adamw) {
  return adamw ? rotated_update_kernel<D, true> : rotated_update_kernel<D, false>;
}

} // namespace fogzo::cuda
