// The fused tail: G, the optimizer's step in place, the next Q(theta), in one pass (docs/contract.md,
// section 4). A row has the quantized weight in PLUS and the master copy in MINUS; a tensor without an
// alpha is not quantized: G = g, and no Q is written.
#include "launch.cuh"
#include "losses.cuh"
#include "tail.cuh"

namespace fogzo::cuda {

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

// Of dtypes that are told when it runs with one alpha, one block less on a multiprocessor, or some spill 4
// bytes.
template <Distribution D, bool Adamw, bool Plain, Dtype L, Dtype G, Dtype O>
FOGZO_KERNEL(kThreads, (Plain && L == Dtype::any ? 3 : 4))
update_kernel(FOGZO_PARAMETER Tail p) {
  const Part part = part_of(p.tables);
  const TailNames names = tail_names<Plain, L, G, O>(p, part);
  const Layout layout = layout_of<Plain>(part);
  const Scales scales = names.quantized ? scales_of<Plain>(part, p.grid.r) : Scales{};
  const int chunks = part.chunks();
  if (part.aligned()) {
#pragma unroll 1
    for (int c = thread(); c < chunks; c += kThreads)
      update_chunk<D, Adamw, Plain, true>(p, part, names, layout, scales, c);
  } else {
#pragma unroll 1
    for (int c = thread(); c < chunks; c += kThreads)
      update_chunk<D, Adamw, Plain, false>(p, part, names, layout, scales, c);
  }
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads)
    update_element<D, Adamw>(p, part, names, j);
  count_bad_alphas<Plain>(p.counters, part);
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
                     float *coefficients, int block) {
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
    if (block)
      return launch("rotated_update_kernel", rotated_update_for<D>(adamw), where, plan.blocks, kThreads,
                    Rotated<Tail>{p, rotation_of(block)});
    const TailKernel kernel = adamw ? update_for<D, true>(dtypes, plain) : update_for<D, false>(dtypes, plain);
    launch("update_kernel", kernel, where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
