// Q(theta) into PLUS; and g h'(theta) into PLUS, which may be GRAD. Around a transform Q is of the transformed
// weight, and the derivative H(g h') is taken there.
#include "hadamard.cuh"
#include "launch.cuh"

namespace fogzo::cuda {

struct Quantize {
  Plan plan;
  Dtypes dtypes;
  Grid grid;
  Rotation rotation;
};

template <class Items> FOGZO_DEVICE void quantize(const Quantize &p, const Operands &o, const Items &at) {
  Loads<Items> latent;
  float x[Items::count][Items::size];
  load(at, o.latent, latent);
  widen(latent, o.latent.dtype, x);
  at.transform(x);
  if (at.some)
    unrolled<Items::count>([&](int k) {
      const Scale scale = at.scale(k);
      unrolled<Items::size>([&](int i) { x[k][i] = position(x[k][i], scale.inv, p.grid); });
      at.quantize(o.out, k, x[k], scale.delta, p.grid);
    });
}

template <StraightThrough Kind, class Items>
FOGZO_DEVICE void backward(const Quantize &p, const Operands &o, const Items &at) {
  if constexpr (Items::size > 1) // then addresses that turns move on need no sign
    __builtin_assume(at.first >= 0);
  Loads<Items> latent, grad;
  float x[Items::count][Items::size], g[Items::count][Items::size];
  load(at, o.latent, latent);
  load_own(at, o.grad, grad);
  widen(latent, o.latent.dtype, x);
  widen(grad, o.grad.dtype, g);
  at.transform(x);
  unrolled<Items::count>([&](int k) {
    const Scale scale = at.scale(k);
    unrolled<Items::size>([&](int i) {
      g[k][i] *= derivative_of<Kind>(x[k][i], scale, {p.grid.qmin, p.grid.qmax, p.grid.offset}, p.grid.r);
    });
  });
  at.transform(g);
  if (at.some)
    unrolled<Items::count>([&](int k) { at.store(o.out, k, g[k]); });
}

template <class T> FOGZO_KERNEL(kThreads, 8) quantize_kernel(FOGZO_PARAMETER Quantize p) {
  const Part part = part_of(p.plan);
  const Operands o = operands_of(part, T::of(p.dtypes));
  walk<2>(frame_of<false>(part, p.grid.r), [&](const auto &at) { quantize(p, o, at); });
}

template <class T> FOGZO_KERNEL(kThreads, 8) rotated_quantize_kernel(FOGZO_PARAMETER Quantize p) {
  const Part part = part_of(p.plan);
  const Operands o = operands_of(part, T::of(p.dtypes));
  walk_rotated<T::any>(frame_of<false>(part, p.grid.r), p.rotation,
                       [&](const auto &at) { quantize(p, o, at); });
}

template <StraightThrough Kind, class T> FOGZO_KERNEL(kThreads, 8) backward_kernel(FOGZO_PARAMETER Quantize p) {
  const Part part = part_of(p.plan);
  const Operands o = operands_of(part, T::of(p.dtypes));
  walk<1, !T::any>(frame_of<false>(part, p.grid.r), [&](const auto &at) { backward<Kind>(p, o, at); });
}

template <StraightThrough Kind, class T>
FOGZO_KERNEL(kThreads, 6)
rotated_backward_kernel(FOGZO_PARAMETER Quantize p) {
  const Part part = part_of(p.plan);
  const Operands o = operands_of(part, T::of(p.dtypes));
  walk_rotated<T::any>(frame_of<false>(part, p.grid.r), p.rotation,
                       [&](const auto &at) { backward<Kind>(p, o, at); });
}

void quantize(const Call &call, const Grid &grid, Transform transform) {
  const Quantize p{call.plan, call.dtypes, grid, rotation_of(transform)};
  using Codes = Types<Dtype::float32, Dtype::float32, Dtype::int8>; // a weight's gradient has its dtype
  using ToBfloat16 = Types<Dtype::float32, Dtype::float32, Dtype::bfloat16>;
  if (transform.block)
    return launch_for<Float32, ToBfloat16, Bfloat16, Any>(
        "rotated_quantize_kernel", call, dtypes_around(transform, call.dtypes), p,
        [](auto t) { return rotated_quantize_kernel<decltype(t)>; });
  launch_for<Float32, Bfloat16, Codes, Any>("quantize_kernel", call, call.dtypes, p,
                                            [](auto t) { return quantize_kernel<decltype(t)>; });
}

void straight_through_backward(const Call &call, const Grid &grid, StraightThrough kind, Transform transform) {
  const Quantize p{call.plan, call.dtypes, grid, rotation_of(transform)};
  with_value(kind, [&](auto value) {
    constexpr StraightThrough Kind = decltype(value)::value;
    if (transform.block)
      return launch_for<Float32, Bfloat16, Any>(
          "rotated_backward_kernel", call, dtypes_around(transform, call.dtypes), p,
          [](auto t) { return rotated_backward_kernel<Kind, decltype(t)>; });
    launch_for<Float32, Bfloat16, Any>("backward_kernel", call, call.dtypes, p,
                                       [](auto t) { return backward_kernel<Kind, decltype(t)>; });
  });
}

} // namespace fogzo::cuda
