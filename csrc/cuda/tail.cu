// The fused tail: G, the optimizer's step in place, the next Q(theta), in one pass (docs/contract.md,
// section 4). A row has the quantized weight in PLUS and the master copy in MINUS; a tensor without an
// alpha is not quantized: G = g, and no Q is written.
#include "hadamard.cuh"
#include "launch.cuh"
#include "losses.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

// Places of the coefficients: A, 1 if directions count, 1 if the step is skipped, scalars, the B_i.
enum Place { A_AT, NOISE_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT };
static_assert(ROOT_AT + 1 == kUpdateCoefficients);

struct UpdateCoefficients {
  LossesSource losses;
  Optimizer optimizer;
  float *out;
};

FOGZO_KERNEL(1, 1) update_coefficients_kernel(FOGZO_PARAMETER UpdateCoefficients p) {
  Coefficients found{1.0f, false, false};
  if (p.losses.losses.n)
    found = read_losses(p.losses, p.out + kUpdateCoefficients);
  p.out[A_AT] = found.A;
  p.out[NOISE_AT] = found.usable ? 1.0f : 0.0f;
  p.out[SKIP_AT] = found.norm_lost ? 1.0f : 0.0f;
  const Optimizer &o = p.optimizer;
  const double lr = read(o.lr), count = double(read(o.count));
  p.out[SIZE_AT] = step_size(o.rule, o.hyperparameters, lr, count);
  p.out[DECAY_AT] = step_decay(o.rule, o.hyperparameters, lr, count);
  p.out[ROOT_AT] = step_root(o.rule, o.hyperparameters, count);
}

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

  FOGZO_DEVICE Column weight() const { return master ? MINUS : LATENT; }
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
template <Distribution D, bool Adamw, bool Plain>
FOGZO_DEVICE void update_chunk(const Tail &p, const Part &part, const TailNames &names, const Layout &layout,
                               const Scales &scales, int c) {
  const bool has_first = Adamw || names.update.rule != Rule::sgd;
  char *weight = part.address(names.master ? MINUS : LATENT, bytes_of(names.theta_t));
  char *first_at = part.address(STATE_1, 4), *second_at = part.address(STATE_2, 4);
  Raw raw_first{}, raw_second{};
  const Raw raw = load_chunk(weight, c, names.theta_t);
  const Raw raw_g = load_chunk(part.address(GRAD, bytes_of(names.grad_t)), c, names.grad_t);
  if (has_first)
    raw_first = load_chunk(first_at, c, Dtype::float32);
  if (Adamw)
    raw_second = load_chunk(second_at, c, Dtype::float32);
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
    store_chunk(weight, c, theta, names.theta_t);
    if (names.master)
      store_chunk(part.address(LATENT, bytes_of(names.latent_t)), c, theta, names.latent_t);
    if (has_first)
      store_chunk(first_at, c, first, Dtype::float32);
    if (Adamw)
      store_chunk(second_at, c, second, Dtype::float32);
  } else if (names.master) { // the latent stays, and may differ from its master
    widen(load_chunk(part.address(LATENT, bytes_of(names.latent_t)), c, names.latent_t), names.latent_t, theta);
  }
  if (!p.quantized || !names.quantized)
    return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    theta[i] = position(stored(theta[i], names.latent_t), scale.inv, p.grid);
  store_quantized(part.address(PLUS, bytes_of(names.out_t)), c, theta, scale.delta, p.grid, names.out_t);
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

// With a transform: the noise goes back through it, and Q is that of the rotated latent.
template <Distribution D, bool Adamw, int Block, bool Aligned>
FOGZO_DEVICE void rotated_update(const Tail &p, const Part &part, const TailNames &names) {
  const Layout layout = layout_of<false>(part);
  const Scales scales = scales_of<false>(part, p.grid.r);
  const bool has_first = Adamw || names.update.rule != Rule::sgd;
  every_chunk(part, [&](int c, bool some) {
    float theta[kChunk], g[kChunk], acc[kChunk] = {}, first[kChunk] = {}, second[kChunk] = {};
    load_part<Aligned>(part, names.skip ? LATENT : names.weight(), c,
                       names.skip ? names.latent_t : names.theta_t, theta);
    const Scale scale = chunk_scale<false>(scales, c);
    if (!names.skip) {
      load_part<Aligned>(part, GRAD, c, names.grad_t, g);
      if (has_first)
        load_part<Aligned>(part, STATE_1, c, Dtype::float32, first);
      if (Adamw)
        load_part<Aligned>(part, STATE_2, c, Dtype::float32, second);
      sum_noise<D, false>(p, names, chunk_number<false>(layout, c), acc);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        acc[i] *= scale.inv;
      if (names.noisy)
        transform_of<Block>(acc, p.grid.block);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        theta[i] = stepped<Adamw>(names.update, theta[i], names.noisy ? std::fma(names.A, g[i], acc[i]) : g[i],
                                  first[i], second[i]);
      if (some) {
        store_part<Aligned>(part, names.weight(), c, names.theta_t, theta);
        if (names.master)
          store_part<Aligned>(part, LATENT, c, names.latent_t, theta);
        if (has_first)
          store_part<Aligned>(part, STATE_1, c, Dtype::float32, first);
        if (Adamw)
          store_part<Aligned>(part, STATE_2, c, Dtype::float32, second);
      }
    }
    if (!p.quantized)
      return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      theta[i] = stored(theta[i], names.latent_t);
    transform_of<Block>(theta, p.grid.block);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      theta[i] = position(theta[i], scale.inv, p.grid);
    if (some)
      quantize_part<Aligned>(part, PLUS, c, names.out_t, theta, scale, p.grid);
  });
}

// Tensors without an alpha are left to plain_update_kernel.
template <Distribution D, bool Adamw, Dtype L, Dtype G, Dtype O, int Block>
FOGZO_KERNEL(kThreads, Block ? 4 : 3)
rotated_update_kernel(FOGZO_PARAMETER Tail p) {
  const Part part = part_of(p.tables);
  count_bad_alphas(p.counters, part);
  const TailNames names = tail_names<false, L, G, O>(p, part);
  if (!names.quantized)
    return;
  if (part[FAST])
    rotated_update<D, Adamw, Block, true>(p, part, names);
  else
    rotated_update<D, Adamw, Block, false>(p, part, names);
}

template <Distribution D, bool Adamw, bool Plain>
FOGZO_DEVICE void update_all(const Tail &p, const Part &part, const TailNames &names) {
  const Layout layout = layout_of<Plain>(part);
  const Scales scales = names.quantized ? scales_of<Plain>(part, p.grid.r) : Scales{};
  const int chunks = part.chunks();
#pragma unroll 1
  for (int c = thread(); c < chunks; c += kThreads)
    update_chunk<D, Adamw, Plain>(p, part, names, layout, scales, c);
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads)
    update_element<D, Adamw>(p, part, names, j);
}

// Tensors without an alpha, and so without noise, beside rotated_update_kernel.
template <bool Adamw> FOGZO_KERNEL(kThreads, 4) plain_update_kernel(FOGZO_PARAMETER Tail p) {
  constexpr Dtype any = Dtype::any;
  const Part part = part_of(p.tables);
  const TailNames names = tail_names<false, any, any, any>(p, part);
  if (!names.quantized)
    update_all<Distribution::uniform, Adamw, false>(p, part, names);
}

template <Distribution D, bool Adamw, bool Plain, Dtype L, Dtype G, Dtype O>
FOGZO_KERNEL(kThreads, 4)
update_kernel(FOGZO_PARAMETER Tail p) {
  const Part part = part_of(p.tables);
  count_bad_alphas(p.counters, part);
  update_all<D, Adamw, Plain>(p, part, tail_names<Plain, L, G, O>(p, part));
}

using TailKernel = void (*)(Tail);

// The common dtypes are compiled where scalars come from the host and alphas are per tensor; the others
// are told when the kernel runs, which the memory's time hides.
template <Distribution D, bool Adamw> TailKernel update_for(const Dtypes &t, bool plain) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto is = [&](Dtype latent, Dtype grad, Dtype out) {
    return t.latent == latent && t.grad == grad && t.out == out;
  };
  if (!plain)
    return update_kernel<D, Adamw, false, any, any, any>;
  if (is(f32, b16, b16))
    return update_kernel<D, Adamw, true, f32, b16, b16>;
  if (is(f32, f32, f32))
    return update_kernel<D, Adamw, true, f32, f32, f32>;
  if (is(b16, b16, b16))
    return update_kernel<D, Adamw, true, b16, b16, b16>;
  return update_kernel<D, Adamw, true, any, any, any>;
}

void estimate_update(const Where &where, const Plan &plan, const Dtypes &dtypes, bool master, bool quantized,
                     const Draw &draw, const Losses &losses, const Grid &grid, const Optimizer &optimizer,
                     float *coefficients) {
  launch("update_coefficients_kernel", update_coefficients_kernel, where, 1, 1,
         UpdateCoefficients{losses_of(draw, losses), optimizer, coefficients});
  const bool plain = plan.per_tensor && !plan.shard && draw.step.on_host();
  const Tail p{tables_of(plan),
               source_of(draw.step),
               coefficients,
               int(losses.n),
               grid,
               update_of(optimizer.rule, optimizer.hyperparameters),
               master,
               quantized,
               dtypes,
               losses.counters};
  const bool adamw = optimizer.rule == Rule::adamw;
  with_value(draw.distribution, [&](auto which) {
    constexpr Distribution D = decltype(which)::value;
    constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
    const bool mixed = dtypes.latent == f32 && dtypes.grad == b16 && dtypes.out == b16;
    const bool common = adamw && mixed && grid.block == kCommonBlock;
    if (grid.block) {
      launch_with_barriers("rotated_update_kernel",
                           common  ? rotated_update_kernel<D, true, f32, b16, b16, kCommonBlock>
                           : adamw ? rotated_update_kernel<D, true, any, any, any, 0>
                                   : rotated_update_kernel<D, false, any, any, any, 0>,
                           where, plan.blocks, kThreads, p);
      return launch("plain_update_kernel", adamw ? plain_update_kernel<true> : plain_update_kernel<false>,
                    where, plan.blocks, kThreads, p);
    }
    const TailKernel kernel = adamw ? update_for<D, true>(dtypes, plain) : update_for<D, false>(dtypes, plain);
    launch("update_kernel", kernel, where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
