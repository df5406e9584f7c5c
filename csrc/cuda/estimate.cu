// G in place of g: fma(A, g, inv sum_i B_i t m_i), all directions in one pass. Around a transform noise is in
// the basis of the quantizer, and g is not: fma(A, g, H(inv sum_i B_i t m_i)). The build compiles this file
// once for each distribution of the noise.
#include "hadamard.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace fogzo::cuda {

struct Estimate {
  Plan plan;
  Dtypes dtypes;
  Source source;
  const float *coefficients, *factors;
  int directions;
  float r;
  int64_t *counters;
  Rotation rotation;
};

template <Distribution D, class Items>
FOGZO_DEVICE void estimate(const Estimate &p, const Names &names, float A, float t, const Operand &grad,
                           const Items &at) {
  Loads<Items> loads;
  float x[Items::count][Items::size] = {};
  load_own(at, grad, loads);
  add_noise<D>(at, names, p.coefficients + kCoefficients, t, p.directions, x);
  unrolled<Items::count>([&](int k) {
    const float inv = at.scale(k).inv;
    unrolled<Items::size>([&](int i) { x[k][i] *= inv; });
  });
  at.transform(x);
  if (!at.some)
    return;
  unrolled<Items::count>([&](int k) {
    float g[Items::size];
    widen(loads[k], grad.dtype, g);
    unrolled<Items::size>([&](int i) { g[i] = std::fma(A, g[i], x[k][i]); });
    at.store(grad, k, g);
  });
}

// Gives the block's elements to the estimate by `walk`, if some direction counts.
template <Distribution D, class T, bool Plain, class Walk>
FOGZO_DEVICE void estimate_part(const Estimate &p, Walk walk) {
  const Part part = part_of(p.plan);
  if (p.coefficients[NOISE_AT] != 0.0f) {
    const Names names = names_of<Plain>(p.source, part);
    const float A = p.coefficients[A_AT], t = factor_of<!Plain>(p.factors, part);
    const Operand grad = opaque(part.operand(GRAD, T::of(p.dtypes).grad));
    walk(frame_of<Plain>(part, p.r), [&](const auto &at) { estimate<D>(p, names, A, t, grad, at); });
  }
  count_bad_alphas<Plain>(p.counters, part);
}

template <Distribution D, class T, bool Plain>
FOGZO_KERNEL(kThreads, Plain ? 6 : 4)
estimate_kernel(FOGZO_PARAMETER Estimate p) {
  estimate_part<D, T, Plain>(p, [&](const auto &frame, auto f) { walk<2>(frame, f); });
}

template <Distribution D, class T>
FOGZO_KERNEL(kThreads, 4)
rotated_estimate_kernel(FOGZO_PARAMETER Estimate p) {
  estimate_part<D, T, false>(p, [&](const auto &frame, auto f) { walk_rotated<T::any>(frame, p.rotation, f); });
}

template <Distribution D>
void estimate_gradient(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses, float r,
                       Transform transform, float *coefficients) {
  write_coefficients(call, draw, mix, losses, nullptr, coefficients);
  const Estimate p{
      call.plan, call.dtypes,     source_of(draw),       coefficients, mix.factors, int(losses.directions()),
      r,         losses.counters, rotation_of(transform)};
  if (transform.block)
    return launch_for<Float32, Bfloat16, Any>("rotated_estimate_kernel", call,
                                              dtypes_around(transform, call.dtypes), p,
                                              [](auto t) { return rotated_estimate_kernel<D, decltype(t)>; });
  const bool plain = is_plain(call.plan, on_host(draw, mix));
  launch_for<Float32, Bfloat16, Float16>("estimate_kernel", call, call.dtypes, p, [&](auto t) {
    return plain ? estimate_kernel<D, decltype(t), true> : estimate_kernel<D, decltype(t), false>;
  });
}

template void estimate_gradient<Distribution::FOGZO_DISTRIBUTION>(const Call &, const Draw &, const Mix &,
                                                                  const Losses &, float, Transform, float *);

} // namespace fogzo::cuda
