// The fused tail's device functions: a chunk, an element.
#pragma once

#include "hadamard.cuh"
#include "noise.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

// Places of the coefficients: A, 1 if directions count, 1 if the step is skipped, scalars, the B_i.
enum Place { A_AT, NOISE_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT };
static_assert(ROOT_AT + 1 == kUpdateCoefficients);

struct Tail {
  Tables tables;
  Source source;
  const float *coefficients;
  int directions;
  Grid grid;
  Update update; // size, decay and root come from the coefficients
  bool master, quantized;
  Dtypes dtypes;
  int64_t *counters;
};

// What is constant over a block.
struct TailNames {
  Keys keys;
  uint32_t step, tensor_id;
  bool quantized, noisy, skip, master;
  int directions;
  float A;
  Update update;
  Dtype latent_t, grad_t, out_t, theta_t;
};

template <bool Plain, Dtype L, Dtype G, Dtype O>
FOGZO_DEVICE TailNames tail_names(const Tail &p, const Part &part) {
  TailNames names{keys_of<Plain>(p.source), step_of<Plain>(p.source), uint32_t(part[TENSOR_ID])};
  const float *coefficients = p.coefficients;
  names.quantized = part[ALPHA] != 0;
  names.noisy = names.quantized && coefficients[NOISE_AT] != 0.0f;
  names.skip = coefficients[SKIP_AT] != 0.0f;
  names.master = p.master;
  names.directions = names.noisy ? p.directions : 0;
  names.A = coefficients[A_AT];
  names.update = p.update;
  names.update.size = coefficients[SIZE_AT];
  names.update.decay = coefficients[DECAY_AT];
  names.update.root = coefficients[ROOT_AT];
  names.latent_t = actual<L>(p.dtypes.latent);
  names.grad_t = actual<G>(p.dtypes.grad);
  names.out_t = actual<O>(p.dtypes.out);
  names.theta_t = p.master ? Dtype::float32 : names.latent_t;
  return names;
}

// theta and its state after the step; Adamw: else one of SGD's rules, which the run knows.
template <bool Adamw>
FOGZO_DEVICE float stepped(const Update &u, float theta, float G, float &first, float &second) {
  static_assert(kCount<Rule> == 4, "stepped() must know each rule"); // a switch would cost instructions
  if (Adamw)
    return updated<Rule::adamw>(u, theta, G, first, second);
  if (u.rule == Rule::sgd)
    return updated<Rule::sgd>(u, theta, G, first, second);
  if (u.rule == Rule::momentum)
    return updated<Rule::momentum>(u, theta, G, first, second);
  return updated<Rule::nesterov>(u, theta, G, first, second);
}

// x as it is after a store in the dtype.
FOGZO_DEVICE float stored(float x, Dtype dtype) {
  if (dtype == Dtype::float32)
    return x;
  float even, odd;
  widen_half(pack(x, 0.0f, dtype), dtype, even, odd);
  return even;
}

template <Distribution D, bool Plain>
FOGZO_DEVICE void sum_noise(const Tail &p, const TailNames &names, int64_t chunk, float (&acc)[kChunk]) {
#pragma unroll 1
  for (int i = 0; i < names.directions; ++i) {
    float m[kChunk];
    scaled_noise<D>(words_of(chunk, uint32_t(i), names.step, names.tensor_id, names.keys), m);
    const float B = *global(p.coefficients + kUpdateCoefficients + i);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      acc[j] = std::fma(B, m[j], acc[j]);
  }
}

// One chunk's latents, gradients and states.
template <Distribution D, bool Adamw, bool Plain, bool Aligned>
FOGZO_DEVICE void update_chunk(const Tail &p, const Part &part, const TailNames &names, const Layout &layout,
                               const Scales &scales, int c) {
  const bool has_first = Adamw || names.update.rule != Rule::sgd;
  char *weight = part.address(names.master ? MINUS : LATENT, bytes_of(names.theta_t));
  char *first_at = part.address(STATE_1, 4), *second_at = part.address(STATE_2, 4);
  Raw raw_first{}, raw_second{};
  const Raw raw = load_chunk<Aligned>(weight, c, names.theta_t);
  const Raw raw_g = load_chunk<Aligned>(part.address(GRAD, bytes_of(names.grad_t)), c, names.grad_t);
  if (has_first)
    raw_first = load_chunk<Aligned>(first_at, c, Dtype::float32);
  if (Adamw)
    raw_second = load_chunk<Aligned>(second_at, c, Dtype::float32);
  float theta[kChunk], g[kChunk], first[kChunk], second[kChunk], acc[kChunk] = {};
  sum_noise<D, Plain>(p, names, chunk_number<Plain>(layout, c), acc);
  widen(raw, names.theta_t, theta);
  widen(raw_g, names.grad_t, g);
  widen(raw_first, Dtype::float32, first);
  widen(raw_second, Dtype::float32, second);
  const Scale scale = names.quantized ? chunk_scale<Plain>(scales, c) : Scale{1.0f, 1.0f};
  if (!names.skip) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float G = names.noisy ? estimate_of(names.A, g[i], scale.inv, acc[i]) : g[i];
      theta[i] = stepped<Adamw>(names.update, theta[i], G, first[i], second[i]);
    }
    store_chunk<Aligned>(weight, c, theta, names.theta_t);
    if (names.master)
      store_chunk<Aligned>(part.address(LATENT, bytes_of(names.latent_t)), c, theta, names.latent_t);
    if (has_first)
      store_chunk<Aligned>(first_at, c, first, Dtype::float32);
    if (Adamw)
      store_chunk<Aligned>(second_at, c, second, Dtype::float32);
  } else if (names.master) { // the latent stays, and may differ from its master
    widen(load_chunk<Aligned>(part.address(LATENT, bytes_of(names.latent_t)), c, names.latent_t),
          names.latent_t, theta);
  }
  if (!p.quantized || !names.quantized)
    return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    theta[i] = position(stored(theta[i], names.latent_t), scale.inv, p.grid);
  store_quantized<Aligned>(part.address(PLUS, bytes_of(names.out_t)), c, theta, scale.delta, p.grid,
                           names.out_t);
}

template <Distribution D, bool Adamw>
FOGZO_DEVICE void update_element(const Tail &p, const Part &part, const TailNames &names, int64_t j) {
  const bool has_first = Adamw || names.update.rule != Rule::sgd;
  void *weight = part.pointer<void>(names.master ? MINUS : LATENT), *latent = part.pointer<void>(LATENT);
  void *first_at = part.pointer<void>(STATE_1), *second_at = part.pointer<void>(STATE_2);
  const Scale scale = names.quantized ? element_scale(part, j, p.grid.r) : Scale{1.0f, 1.0f};
  float theta = load_element(names.skip ? latent : weight, j, names.skip ? names.latent_t : names.theta_t);
  if (!names.skip) {
    float G = load_element(part.pointer<void>(GRAD), j, names.grad_t), acc = 0.0f;
#pragma unroll 1
    for (int i = 0; i < names.directions; ++i)
      acc = std::fma(
          *global(p.coefficients + kUpdateCoefficients + i),
          scaled_element<D>(element_number(part, j), uint32_t(i), names.step, names.tensor_id, names.keys),
          acc);
    if (names.noisy)
      G = estimate_of(names.A, G, scale.inv, acc);
    float first = has_first ? load_element(first_at, j, Dtype::float32) : 0.0f;
    float second = Adamw ? load_element(second_at, j, Dtype::float32) : 0.0f;
    theta = stepped<Adamw>(names.update, theta, G, first, second);
    store_element(weight, j, theta, names.theta_t);
    if (names.master)
      store_element(latent, j, theta, names.latent_t);
    if (has_first)
      store_element(first_at, j, first, Dtype::float32);
    if (Adamw)
      store_element(second_at, j, second, Dtype::float32);
  }
  if (p.quantized && names.quantized)
    store_quantized_element(part.pointer<void>(PLUS), j,
                            position(stored(theta, names.latent_t), scale.inv, p.grid), scale.delta, p.grid,
                            names.out_t);
}

using RotatedTailKernel = void (*)(Rotated<Tail>);

// The kernel around transforms (rotated_tail.cuh).
template <Distribution D> RotatedTailKernel rotated_update_for(bool adamw);

#define FOGZO_ELSEWHERE(name, ...)                                                                             \
  extern template RotatedTailKernel rotated_update_for<Distribution::name>(bool);
FOGZO_DISTRIBUTIONS(FOGZO_ELSEWHERE)
#undef FOGZO_ELSEWHERE

} // namespace fogzo::cuda
