// Q(w + eps v) and Q(w - eps v) in one pass, for the distributions that perturb_kernels.cu compiles.
#pragma once

#include "hadamard.cuh"
#include "launch.cuh"
#include "noise.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct Perturb {
  Tables tables;
  Source source;
  MixingSource mixing;
  const float *norm;
  uint32_t direction;
  float sign; // of the direction, where the host knows it
  float eps;  // negative where only minus is written
  Grid grid;
  Column out; // where one sign is written
  Dtypes dtypes;
};

// What is constant over a block.
struct Names {
  Keys keys;
  uint32_t direction, step, tensor_id;
  float a, b; // of guide and noise (docs/contract.md, section 4)
};

template <bool Plain> FOGZO_DEVICE Names perturb_names(const Perturb &p, const Part &part) {
  Names names{keys_of<Plain>(p.source),  p.direction, step_of<Plain>(p.source),
              uint32_t(part[TENSOR_ID]), 0.0f,        0.0f};
  const Mixing mixing = read_mixing<Plain>(p.mixing);
  const float sign = Plain ? p.sign : sign_of(p.direction, names.step, names.keys);
  names.a = over_norm(mixing.guide * sign, *p.norm);
  names.b = mixing.noise;
  return names;
}

// Positions y of a chunk under both signs: fma(+-eps, v, z), v = fma(a delta, g, b m).
template <Distribution D, bool Plain>
FOGZO_DEVICE void perturbed(const Perturb &p, const Names &names, int64_t chunk, const Scale &scale,
                            const Raw &latent, const Raw &grad, Dtype latent_t, Dtype grad_t,
                            float (&plus)[kChunk], float (&minus)[kChunk]) {
  float theta[kChunk], g[kChunk], m[kChunk];
  widen(latent, latent_t, theta);
  widen(grad, grad_t, g);
  scaled_noise<D>(words_of(chunk, names.direction, names.step, names.tensor_id, names.keys), m);
  const float gam = names.a * scale.delta;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float v = direction_of(gam, g[i], names.b, m[i]), z = position(theta[i], scale.inv, p.grid);
    plus[i] = std::fma(p.eps, v, z);
    minus[i] = std::fma(-p.eps, v, z);
  }
}

template <Distribution D, bool Plain>
FOGZO_DEVICE void perturb_rest(const Perturb &p, const Part &part, const Names &names, bool both,
                               Dtype latent_t, Dtype grad_t, Dtype out_t) {
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const Scale scale = element_scale(part, j, p.grid.r);
    const float m =
        scaled_element<D>(element_number(part, j), names.direction, names.step, names.tensor_id, names.keys);
    const float g = load_element(part.pointer<void>(GRAD), j, grad_t);
    const float theta = load_element(part.pointer<void>(LATENT), j, latent_t);
    const float v = direction_of(names.a * scale.delta, g, names.b, m);
    const float z = position(theta, scale.inv, p.grid);
    store_quantized_element(part.pointer<void>(p.out), j, std::fma(p.eps, v, z), scale.delta, p.grid, out_t);
    if (both)
      store_quantized_element(part.pointer<void>(MINUS), j, std::fma(-p.eps, v, z), scale.delta, p.grid, out_t);
  }
}

// The block's chunks: where they lie in memory, in the parameter and under which scale.
template <bool Plain> struct Operands {
  const char *latent, *grad;
  char *out, *other; // plus and minus, or the one that is written and null
  Layout layout;
  Scales scales;
};

// Chunks c, c + kThreads, ... of a thread, all of them in flight at once.
template <int Count, Distribution D, bool Both, bool Plain>
FOGZO_DEVICE void perturb_chunks(const Perturb &p, const Names &names, const Operands<Plain> &at, int c,
                                 Dtype latent_t, Dtype grad_t, Dtype out_t) {
  Raw theta[Count], g[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    theta[k] = load_chunk<(Count > 1)>(at.latent, c + k * kThreads, latent_t);
    g[k] = load_chunk<(Count > 1)>(at.grad, c + k * kThreads, grad_t);
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const int one = c + k * kThreads;
    const Scale scale = chunk_scale<Plain>(at.scales, one);
    float plus[kChunk], minus[kChunk];
    perturbed<D, Plain>(p, names, chunk_number<Plain>(at.layout, one), scale, theta[k], g[k], latent_t, grad_t,
                        plus, minus);
    store_quantized<(Count > 1)>(at.out, one, plus, scale.delta, p.grid, out_t);
    if (Both)
      store_quantized<(Count > 1)>(at.other, one, minus, scale.delta, p.grid, out_t);
  }
}

// Both: plus and minus are written, else the one that p.out names. Plain: one alpha per tensor, no shard
// of several rows, and the step's scalars from the host.
template <Distribution D, Dtype L, Dtype G, Dtype O, bool Both, bool Plain>
FOGZO_KERNEL(kThreads, 6)
perturb_kernel(FOGZO_PARAMETER Perturb p) {
  const Dtype latent_t = actual<L>(p.dtypes.latent), grad_t = actual<G>(p.dtypes.grad);
  const Dtype out_t = actual<O>(p.dtypes.out);
  const Part part = part_of(p.tables);
  const Names names = perturb_names<Plain>(p, part);
  const Operands<Plain> at{part.address(LATENT, bytes_of(latent_t)),
                           part.address(GRAD, bytes_of(grad_t)),
                           part.address(Both ? PLUS : p.out, bytes_of(out_t)),
                           part.address(MINUS, bytes_of(out_t)),
                           layout_of<Plain>(part),
                           scales_of<Plain>(part, p.grid.r)};
  const int chunks = part.chunks(), wide = part.aligned() ? chunks : 0;
  int c = thread();
#pragma unroll 1
  for (; c + kThreads < wide; c += 2 * kThreads)
    perturb_chunks<2, D, Both, Plain>(p, names, at, c, latent_t, grad_t, out_t);
#pragma unroll 1
  for (; c < chunks; c += kThreads)
    perturb_chunks<1, D, Both, Plain>(p, names, at, c, latent_t, grad_t, out_t);
  perturb_rest<D, Plain>(p, part, names, Both, latent_t, grad_t, out_t);
}

using PerturbKernel = void (*)(Perturb);

template <Distribution D, Dtype L, Dtype G, Dtype O> PerturbKernel perturb_of(bool both, bool plain) {
  if (plain)
    return both ? perturb_kernel<D, L, G, O, true, true> : perturb_kernel<D, L, G, O, false, true>;
  return both ? perturb_kernel<D, L, G, O, true, false> : perturb_kernel<D, L, G, O, false, false>;
}

// The kernel for these dtypes: the common ones are compiled, the others are told when they run.
template <Distribution D> PerturbKernel perturb_for(const Dtypes &t, bool both, bool plain) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, f16 = Dtype::float16, i8 = Dtype::int8;
  const auto is = [&](Dtype latent, Dtype grad, Dtype out) {
    return t.latent == latent && t.grad == grad && t.out == out;
  };
  if (is(f32, f32, f32))
    return perturb_of<D, f32, f32, f32>(both, plain);
  if (is(b16, b16, b16))
    return perturb_of<D, b16, b16, b16>(both, plain);
  if (is(f16, f16, f16))
    return perturb_of<D, f16, f16, f16>(both, plain);
  if (is(f32, b16, b16))
    return perturb_of<D, f32, b16, b16>(both, plain);
  if (is(b16, b16, i8))
    return perturb_of<D, b16, b16, i8>(both, plain);
  if (is(f32, f32, i8))
    return perturb_of<D, f32, f32, i8>(both, plain);
  constexpr Dtype any = Dtype::any;
  return both ? perturb_kernel<D, any, any, any, true, false> : perturb_kernel<D, any, any, any, false, false>;
}

using RotatedPerturbKernel = void (*)(Rotated<Perturb>);

// The kernel around a transform (rotated_perturb.cuh).
template <Distribution D> RotatedPerturbKernel rotated_perturb_for(const Dtypes &t, bool both, int block);

#define FOGZO_ELSEWHERE(name, ...)                                                                             \
  extern template PerturbKernel perturb_for<Distribution::name>(const Dtypes &, bool, bool);                   \
  extern template RotatedPerturbKernel rotated_perturb_for<Distribution::name>(const Dtypes &, bool, int);
FOGZO_DISTRIBUTIONS(FOGZO_ELSEWHERE)
#undef FOGZO_ELSEWHERE

} // namespace fogzo::cuda
