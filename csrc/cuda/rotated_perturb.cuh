// Q of the rotated weight, moved: the guide moves the weight as it is, the noise moves the rotated one, so that
// one transform a sign is enough (docs/contract.md, section 4). For those distributions that rotated_kernels.cu
// compiles.
#pragma once

#include "perturb.cuh"

namespace fogzo::cuda {

// Rotated weights of two chunks that went eps along the guide.
template <bool Far>
FOGZO_DEVICE void rotated_weights(const Raw (&latent)[2], const Raw (&grad)[2], float along, Dtype latent_t,
                                  Dtype grad_t, const Rotation &rotation, float (&x)[2][kChunk]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float g[kChunk];
    widen(latent[k], latent_t, x[k]);
    widen(grad[k], grad_t, g);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[k][i] = std::fma(along, g[i], x[k][i]);
  }
  rotate<Far>(x, rotation);
}

// b m of two chunks.
template <Distribution D>
FOGZO_DEVICE void noise_of_two(const Names &names, int64_t chunk, int half, float (&u)[2][kChunk]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    scaled_noise<D>(words_of(chunk + k * half, names.direction, names.step, names.tensor_id, names.keys), u[k]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      u[k][i] *= names.b;
  }
}

// Writes Q of two chunks, given their rotated weights.
template <bool Aligned>
FOGZO_DEVICE void store_two(char *out, const TwoChunks &c, float (&x)[2][kChunk], const float (&u)[2][kChunk],
                            float eps, const Scale &scale, const Grid &grid, Dtype dtype) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    x[0][i] = std::fma(eps, u[0][i], position(x[0][i], scale.inv, grid));
    x[1][i] = std::fma(eps, u[1][i], position(x[1][i], scale.inv, grid));
  }
  if (!c.some)
    return;
  store_quantized<Aligned>(out, c.first, x[0], scale.delta, grid, dtype);
  store_quantized<Aligned>(out, c.second, x[1], scale.delta, grid, dtype);
}

template <Distribution D, bool Both, bool Far, bool Aligned>
FOGZO_DEVICE void rotated_perturb(const Rotated<Perturb> &p, const Part &part, Dtype latent_t, Dtype grad_t,
                                  Dtype out_t) {
  const Perturb &op = p.op;
  const Names names = perturb_names<false>(op, part);
  const Layout layout = layout_of<false>(part);
  const Scales scales = scales_of<false>(part, op.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t)), *grad = part.address(GRAD, bytes_of(grad_t));
  char *out = part.address(Both ? PLUS : op.out, bytes_of(out_t)),
       *other = part.address(MINUS, bytes_of(out_t));
  const int chunks = all_chunks(part);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kPairs) {
    const TwoChunks c = two_chunks(p.rotation, turn, chunks);
    const Raw theta[2]{load_chunk<Aligned>(latent, c.first, latent_t),
                       load_chunk<Aligned>(latent, c.second, latent_t)};
    const Raw g[2]{load_chunk<Aligned>(grad, c.first, grad_t), load_chunk<Aligned>(grad, c.second, grad_t)};
    const Scale scale = chunk_scale<false>(scales, c.first); // of both: a block has one
    const float along = op.eps * (names.a * scale.delta) * scale.delta;
    float x[2][kChunk], u[2][kChunk];
    rotated_weights<Far>(theta, g, along, latent_t, grad_t, p.rotation, x);
    noise_of_two<D>(names, chunk_number<false>(layout, c.first), p.rotation.half, u);
    store_two<Aligned>(out, c, x, u, op.eps, scale, op.grid, out_t);
    if (!Both)
      continue;
    rotated_weights<Far>(theta, g, -along, latent_t, grad_t, p.rotation, x);
    store_two<Aligned>(other, c, x, u, -op.eps, scale, op.grid, out_t);
  }
}

template <Distribution D, Dtype L, Dtype G, Dtype O, bool Both, bool Far>
FOGZO_KERNEL(kThreads, 4)
rotated_perturb_kernel(FOGZO_PARAMETER Rotated<Perturb> p) {
  const Dtype latent_t = actual<L>(p.op.dtypes.latent), grad_t = actual<G>(p.op.dtypes.grad);
  const Dtype out_t = actual<O>(p.op.dtypes.out);
  const Part part = part_of(p.op.tables);
  if (part.aligned())
    rotated_perturb<D, Both, Far, true>(p, part, latent_t, grad_t, out_t);
  else
    rotated_perturb<D, Both, Far, false>(p, part, latent_t, grad_t, out_t);
}

template <Distribution D, Dtype L, Dtype G, Dtype O, bool Far>
RotatedPerturbKernel rotated_perturb_of(bool both) {
  return both ? rotated_perturb_kernel<D, L, G, O, true, Far> : rotated_perturb_kernel<D, L, G, O, false, Far>;
}

// The common dtypes are compiled for blocks within a warp; any other pair is told when it runs.
template <Distribution D> RotatedPerturbKernel rotated_perturb_for(const Dtypes &t, bool both, int block) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto is = [&](Dtype latent, Dtype grad, Dtype out) {
    return !between_warps(block) && t.latent == latent && t.grad == grad && t.out == out;
  };
  if (is(b16, b16, b16))
    return rotated_perturb_of<D, b16, b16, b16, false>(both);
  if (is(f32, b16, b16))
    return rotated_perturb_of<D, f32, b16, b16, false>(both);
  if (is(f32, f32, f32))
    return rotated_perturb_of<D, f32, f32, f32, false>(both);
  return rotated_perturb_of<D, any, any, any, true>(both);
}

} // namespace fogzo::cuda
