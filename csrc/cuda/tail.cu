// The fused tail: G, the optimizer's step in place, the next Q(theta), in one pass (docs/contract.md,
// section 4). A row has the quantized weight in PLUS and the master copy in MINUS. A tensor without an alpha is
// not quantized: G = g, and no Q is written. Around a transform noise is transformed back, and the stored
// latent is transformed for Q. The build compiles this file once for each distribution of the noise.
#include "hadamard.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace fogzo::cuda {

struct Tail {
  Plan plan;
  Dtypes dtypes;
  Source source;
  const float *coefficients, *factors;
  int directions;
  Grid grid;
  Update update; // size, decay and root come from the coefficients
  bool master, quantized;
  int64_t *counters;
  Rotation rotation;
};

// The constants of a thread block.
struct Step {
  Names names;
  bool quantized, noisy, skip;
  int directions;
  float A, t;
  Update update;
  Dtypes dtypes;
};

template <bool Own, bool Plain, class T> FOGZO_DEVICE Step step_of(const Tail &p, const Part &part) {
  const float *coefficients = p.coefficients;
  Step step{names_of<Plain>(p.source, part)};
  step.quantized = part[ALPHA] != 0;
  step.noisy = step.quantized && coefficients[NOISE_AT] != 0.0f;
  step.skip = coefficients[SKIP_AT] != 0.0f;
  step.directions = step.noisy ? p.directions : 0;
  step.A = coefficients[A_AT];
  step.t = step.noisy ? factor_of<Own>(p.factors, part) : 1.0f;
  step.update = p.update;
  step.update.size = coefficients[SIZE_AT];
  step.update.decay = coefficients[DECAY_AT];
  step.update.root = coefficients[ROOT_AT];
  step.dtypes = T::of(p.dtypes);
  return step;
}

// Gives theta after the step, and writes its states. Without Adamw the rule is one of SGD's, which the run
// knows.
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

// Gives x as it is after a store in the dtype.
FOGZO_DEVICE float stored(float x, Dtype dtype) {
  if (dtype == Dtype::float32)
    return x;
  float even, odd;
  widen_half(pack(x, 0.0f, dtype), dtype, even, odd);
  return even;
}

template <class Items> struct TailItem {
  typename Items::Loaded theta, g, first, second;
};

template <Distribution D, bool Adamw, class Items>
FOGZO_DEVICE void update(const Tail &p, const Part &part, const Step &step, const Items &at) {
  constexpr int count = Items::count, size = Items::size;
  const bool has_first = Adamw || step.update.rule != Rule::sgd;
  const Dtype latent = step.dtypes.latent;
  const Operand weight = part.operand(p.master ? MINUS : LATENT, p.master ? Dtype::float32 : latent);
  const Operand grad = part.operand(GRAD, step.dtypes.grad);
  const Operand first = part.operand(STATE_1, Dtype::float32), second = part.operand(STATE_2, Dtype::float32);
  const auto load = [&](int k) {
    TailItem<Items> item{at.load(weight, k), at.load(grad, k)};
    if (has_first)
      item.first = at.load(first, k);
    if (Adamw)
      item.second = at.load(second, k);
    return item;
  };
  TailItem<Items> items[count];
  if (!Items::transformed) // on their way while noise is drawn; two chunks would take too many registers
    items[0] = load(0);
  float x[count][size] = {};
  Scale scale[count];
  unrolled<count>([&](int k) { scale[k] = step.quantized ? at.scale(k) : Scale{1.0f, 1.0f}; });
  add_noise<D>(at, step.names, p.coefficients + kCoefficients, step.t, step.directions, x);
  unrolled<count>([&](int k) { unrolled<size>([&](int i) { x[k][i] *= scale[k].inv; }); });
  if (Items::transformed && step.noisy)
    at.transform(x);
  if (at.some)
    unrolled<count>([&](int k) {
      if (Items::transformed)
        items[k] = load(k);
      float theta[size], g[size], m[size], v[size];
      widen(items[k].theta, weight.dtype, theta);
      widen(items[k].g, grad.dtype, g);
      widen(items[k].first, Dtype::float32, m);
      widen(items[k].second, Dtype::float32, v);
      if (!step.skip) {
        unrolled<size>([&](int i) {
          const float G = step.noisy ? std::fma(step.A, g[i], x[k][i]) : g[i];
          theta[i] = stepped<Adamw>(step.update, theta[i], G, m[i], v[i]);
        });
        at.store(weight, k, theta);
        if (p.master)
          at.store(part.operand(LATENT, latent), k, theta);
        if (has_first)
          at.store(first, k, m);
        if (Adamw)
          at.store(second, k, v);
      } else if (p.master) { // the latent stays, and may differ from its master
        widen(at.load(part.operand(LATENT, latent), k), latent, theta);
      }
      unrolled<size>([&](int i) { x[k][i] = stored(theta[i], latent); });
    });
  if (!p.quantized || !step.quantized)
    return;
  at.transform(x);
  const Operand out = part.operand(PLUS, step.dtypes.out);
  unrolled<count>([&](int k) {
    unrolled<size>([&](int i) { x[k][i] = position(x[k][i], scale[k].inv, p.grid); });
    if (at.some)
      at.quantize(out, k, x[k], scale[k].delta, p.grid);
  });
}

// Of dtypes that are known when it runs and one alpha: one block less on a multiprocessor, or some spill 4
// bytes. Own: tensors have factors of their noise, for which the other kernels lack a register.
template <Distribution D, bool Adamw, bool Own, bool Plain, class T>
FOGZO_KERNEL(kThreads, (Plain && T::any ? 3 : 4))
update_kernel(FOGZO_PARAMETER Tail p) {
  const Part part = part_of(p.plan);
  const Step step = step_of<Own, Plain, T>(p, part);
  const Scales scales = step.quantized ? scales_of<Plain>(part, p.grid.r) : Scales{};
  walk<1, !Adamw>(Frame<Plain>{part, layout_of<Plain>(part), scales},
                  [&](const auto &at) { update<D, Adamw>(p, part, step, at); });
  count_bad_alphas<Plain>(p.counters, part);
}

template <Distribution D, bool Adamw> FOGZO_KERNEL(kThreads, 3) rotated_update_kernel(FOGZO_PARAMETER Tail p) {
  const Part part = part_of(p.plan);
  const Step step = step_of<true, false, Same<Dtype::any>>(p, part);
  const Frame<false> frame = frame_of<false>(part, p.grid.r);
  const auto f = [&](const auto &at) { update<D, Adamw>(p, part, step, at); };
  if (step.quantized)
    walk_rotated<true>(frame, p.rotation, f);
  else
    walk<1, false>(frame, f);
  count_bad_alphas<false>(p.counters, part);
}

template <Distribution D>
void estimate_update(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses, const Grid &grid,
                     Transform transform, const Optimizer &optimizer, float *coefficients, bool quantized) {
  write_coefficients(call, draw, mix, losses, &optimizer, coefficients);
  const Tail p{call.plan,
               call.dtypes,
               source_of(draw),
               coefficients,
               mix.factors,
               int(losses.directions()),
               grid,
               update_of(optimizer.rule, optimizer.hyperparameters),
               optimizer.master,
               quantized,
               losses.counters,
               rotation_of(transform)};
  const bool plain = is_plain(call.plan, on_host(draw, mix));
  with_flag(optimizer.rule == Rule::adamw, [&](auto is_adamw) {
    constexpr bool Adamw = decltype(is_adamw)::value;
    if (transform.block)
      return launch("rotated_update_kernel", rotated_update_kernel<D, Adamw>, call.where, call.plan.blocks, p);
    auto kernel =
        mix.factors ? update_kernel<D, Adamw, true, false, Any> : update_kernel<D, Adamw, false, false, Any>;
    if (plain) // the common dtypes are compiled for this case alone: elsewhere the memory's time hides the rest
      kernel = with_dtypes<MixedBfloat16, Float32, Bfloat16, Any>(
          call.dtypes, [](auto t) { return update_kernel<D, Adamw, false, true, decltype(t)>; });
    launch("update_kernel", kernel, call.where, call.plan.blocks, p);
  });
}

template void estimate_update<Distribution::FOGZO_DISTRIBUTION>(const Call &, const Draw &, const Mix &,
                                                                const Losses &, const Grid &, Transform,
                                                                const Optimizer &, float *, bool);

} // namespace fogzo::cuda
