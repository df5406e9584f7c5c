// Q(theta + eps v) and Q(theta - eps v) in one pass, also around a transform (docs/contract.md, section 4). The
// build compiles this file once for each distribution of the noise; no other file takes as long.
#include "hadamard.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace fogzo::cuda {

// float32 of sqrt(beta), and of sqrt(1 - beta) C over the noise's factor.
struct Mixing {
  float guide, noise;
};

FOGZO_HD Mixing mixing_of(double one_minus_beta, double scale) {
  return {float(std::sqrt(1.0 - one_minus_beta)), float(std::sqrt(one_minus_beta) * scale)};
}

struct Perturb {
  Plan plan;
  Dtypes dtypes;
  Source source;
  const double *one_minus_beta_at; // null: the host made `mixing`
  double scale;
  Mixing mixing;
  const float *norm, *factors;
  uint32_t direction;
  float sign; // of the direction, where the host knows it
  float eps;  // negative where only minus is written
  Grid grid;
  Column out; // where one sign is written
  Rotation rotation;
};

// The constants of a thread block: the noise's names, the coefficients of guide and noise, the operands.
struct Probes {
  Names names;
  float a, b;
  Operand latent, grad, out, other; // out and other: plus and minus, or the written one and nothing
};

template <class T, bool Both, bool Plain> FOGZO_DEVICE Probes probes_of(const Perturb &p, const Part &part) {
  const Dtypes t = T::of(p.dtypes);
  const Names names = names_of<Plain>(p.source, part);
  const Mixing mixing = Plain || !p.one_minus_beta_at ? p.mixing : mixing_of(*p.one_minus_beta_at, p.scale);
  const float guide = mixing.guide * (Plain ? p.sign : sign_of(p.direction, names)), norm = *p.norm;
  return {names,
          norm > 0.0f && norm < INFINITY ? guide / norm : 0.0f,
          mixing.noise * factor_of<!Plain>(p.factors, part),
          opaque(part.operand(LATENT, t.latent)),
          opaque(part.operand(GRAD, t.grad)),
          opaque(part.operand(Both ? PLUS : p.out, t.out)),
          opaque(part.operand(MINUS, t.out))};
}

// Positions fma(+-eps, v, z), v = fma(a delta, g, b m).
template <Distribution D, bool Both, class Items>
FOGZO_DEVICE void perturb(const Perturb &p, const Probes &o, const Items &at) {
  Loads<Items> latent, grad;
  unrolled<Items::count>([&](int k) {
    latent[k] = at.load(o.latent, k);
    grad[k] = at.load(o.grad, k);
  });
  unrolled<Items::count>([&](int k) {
    const Scale scale = at.scale(k);
    float x[Items::size], g[Items::size], m[Items::size];
    widen(latent[k], o.latent.dtype, x);
    widen(grad[k], o.grad.dtype, g);
    scaled_noise<D>(at, k, p.direction, o.names, m);
    const float gam = o.a * scale.delta;
    unrolled<Items::size>([&](int i) {
      const float v = direction_of(gam, g[i], o.b, m[i]), z = position(x[i], scale.inv, p.grid);
      x[i] = std::fma(p.eps, v, z);
      g[i] = std::fma(-p.eps, v, z);
    });
    at.quantize(o.out, k, x, scale.delta, p.grid);
    if (Both)
      at.quantize(o.other, k, g, scale.delta, p.grid);
  });
}

// The guide moves the weight as it is, the noise moves the transformed one, so that one transform for each sign
// is enough.
template <Distribution D, bool Both, class Items>
FOGZO_DEVICE void perturb_rotated(const Perturb &p, const Probes &o, const Items &at) {
  Loads<Items> latent, grad;
  load(at, o.latent, latent);
  load(at, o.grad, grad);
  const Scale scale = at.scale(0);
  float x[2][kChunk], u[2][kChunk];
  const auto rotate = [&](float along) {
    unrolled<2>([&](int k) {
      float g[kChunk];
      widen(latent[k], o.latent.dtype, x[k]);
      widen(grad[k], o.grad.dtype, g);
      unrolled<kChunk>([&](int i) { x[k][i] = std::fma(along, g[i], x[k][i]); });
    });
    at.transform(x);
  };
  const auto quantize = [&](const Operand &out, float eps) {
    unrolled<2>([&](int k) {
      unrolled<kChunk>([&](int i) { x[k][i] = std::fma(eps, u[k][i], position(x[k][i], scale.inv, p.grid)); });
    });
    if (at.some)
      unrolled<2>([&](int k) { at.quantize(out, k, x[k], scale.delta, p.grid); });
  };
  const float along = p.eps * (o.a * scale.delta) * scale.delta;
  rotate(along);
  unrolled<2>([&](int k) {
    scaled_noise<D>(at, k, p.direction, o.names, u[k]);
    unrolled<kChunk>([&](int i) { u[k][i] *= o.b; });
  });
  quantize(o.out, p.eps);
  if (Both) {
    rotate(-along);
    quantize(o.other, -p.eps);
  }
}

template <Distribution D, class T, bool Both, bool Plain>
FOGZO_KERNEL(kThreads, 6)
perturb_kernel(FOGZO_PARAMETER Perturb p) {
  const Part part = part_of(p.plan);
  const Probes o = probes_of<T, Both, Plain>(p, part);
  walk<2>(frame_of<Plain>(part, p.grid.r), [&](const auto &at) { perturb<D, Both>(p, o, at); });
}

template <Distribution D, class T, bool Both>
FOGZO_KERNEL(kThreads, 4)
rotated_perturb_kernel(FOGZO_PARAMETER Perturb p) {
  const Part part = part_of(p.plan);
  const Probes o = probes_of<T, Both, false>(p, part);
  walk_rotated<T::any>(frame_of<false>(part, p.grid.r), p.rotation,
                       [&](const auto &at) { perturb_rotated<D, Both>(p, o, at); });
}

template <Distribution D>
void perturb_quantize(const Call &call, const Draw &draw, const Mix &mix, const Grid &grid, Transform transform,
                      bool plus, bool minus) {
  const double scale = noise_scale(draw);
  const Perturb p{call.plan,
                  call.dtypes,
                  source_of(draw),
                  mix.one_minus_beta.at,
                  scale,
                  mixing_of(mix.one_minus_beta.value, scale),
                  mix.norm,
                  mix.factors,
                  draw.direction,
                  direction_sign(uint64_t(draw.seed.value), uint32_t(draw.step.value), draw.direction),
                  plus ? mix.epsilon : -mix.epsilon,
                  grid,
                  plus ? PLUS : MINUS,
                  rotation_of(transform)};
  with_flag(plus && minus, [&](auto both) {
    constexpr bool Both = decltype(both)::value;
    if (transform.block)
      return launch_for<Bfloat16, MixedBfloat16, Float32, Any>(
          "rotated_perturb_kernel", call, dtypes_around(transform, call.dtypes), p,
          [](auto t) { return rotated_perturb_kernel<D, decltype(t), Both>; });
    using Codes = Types<Dtype::bfloat16, Dtype::bfloat16, Dtype::int8>;
    using Float32Codes = Types<Dtype::float32, Dtype::float32, Dtype::int8>;
    const bool plain = is_plain(call.plan, on_host(draw, mix));
    launch_for<Float32, Bfloat16, Float16, MixedBfloat16, Codes, Float32Codes, Any>(
        "perturb_kernel", call, call.dtypes, p, [&](auto t) {
          using T = decltype(t);
          return plain && !T::any ? perturb_kernel<D, T, Both, !T::any> : perturb_kernel<D, T, Both, false>;
        });
  });
}

template void perturb_quantize<Distribution::FOGZO_DISTRIBUTION>(const Call &, const Draw &, const Mix &,
                                                                 const Grid &, Transform, bool, bool);

} // namespace fogzo::cuda
