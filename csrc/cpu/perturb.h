// Q of theta + eps v delta and theta - eps v delta (docs/contract.md, section 4, perturb).
#pragma once

#include "quantize.h"

namespace fogzo::cpu {
namespace {

void perturb_loops(const Operands &item, const Perturbation &p, int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], m[kTile], out[kTile];
  const GridRange grid = p.grid; // copies of constants: a store could change what lies in memory
  const float a = p.a, b = p.b, r = p.r;
  const Noise noise{p.noise.distribution, names_in(p.noise, item)};
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent), *g = load(item.grad, start, count, grad);
    noise_tile(noise, item.layout, start, count, m);
    const auto write_side = [&](const Span &span, float epsilon) {
      if (!span.data)
        return;
      float *to = target(span, start, out);
      const bool codes = span.dtype == Dtype::int8; // holds the code itself
      for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
        const float gam = a * scale.delta;
        const auto code = [&](int64_t i) {
          const float v = direction_of(gam, g[i], b, m[i]);
          return code_of(probe_of(epsilon, v, position_of(t[i], scale, grid)), grid);
        };
        if (codes)
          FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = code(i);
        else
          FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = value_of(code(i), scale, grid);
      });
      store(to, span, start, count);
    };
    write_side(item.plus, p.epsilon);
    write_side(item.minus, -p.epsilon);
  });
}

#if FOGZO_ISA
struct PerturbScale : VectorScale {
  F gam;
};

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH, bool TABLE> struct PerturbVectors {
  static constexpr bool PAIRS = in_pairs<L, G>(O);
  Quantizer<O, TABLE> quantized;
  F a, b, eps;
  const void *latent, *grad;
  void *plus, *minus;

  PerturbVectors(const Operands &item, const Perturbation &p)
      : quantized(p.grid), a(broadcast(p.a)), b(broadcast(p.b / kNoiseFactor<D>)), eps(broadcast(p.epsilon)),
        latent(item.latent.data), grad(item.grad.data), plus(item.plus.data), minus(item.minus.data) {}

  PerturbScale scale(F delta, F inv) const { return {quantized.scale(delta, inv), a * delta}; }

  inline __attribute__((always_inline)) void prefetch_operands(int64_t i, int64_t bytes) const {
    prefetch<L, 0>(latent, i, bytes);
    prefetch<G, 0>(grad, i, bytes);
    prefetch<O, 1>(plus, i, bytes);
    if (BOTH)
      prefetch<O, 1>(minus, i, bytes);
  }

  // 2 kWidth elements from element i on: the vectors' noise m and scales s0 and s1
  inline __attribute__((always_inline)) void two(Two m, int64_t i, const PerturbScale &s0,
                                                 const PerturbScale &s1) const {
    const Two g = load_two<G, PAIRS>(grad, i), t = load_two<L, PAIRS>(latent, i);
    const F v0 = direction_of(s0.gam, g.first, b, m.first), v1 = direction_of(s1.gam, g.last, b, m.last);
    const F z0 = position_of(t.first, s0, quantized.grid), z1 = position_of(t.last, s1, quantized.grid);
    const auto write_side = [&](void *to, F epsilon) {
      store_two<O, PAIRS, quantized.kNarrow>(to, i, quantized(probe_of(epsilon, v0, z0), s0),
                                             quantized(probe_of(epsilon, v1, z1), s1));
    };
    write_side(plus, eps);
    if (BOTH)
      write_side(minus, -eps);
  }
};

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH, bool TABLE>
void perturb_run(const Operands &item, const Perturbation &p, const Stream &stream, const Run &run) {
  const PerturbVectors<D, L, G, O, BOTH, TABLE> kernel(item, p);
  const PerturbScale scale = kernel.scale(broadcast(run.scale.delta), broadcast(run.scale.inv));
  // On Intel's processors little is drawn at a time, and operands are prefetched: memory is never idle. On
  // AMD's, what is fetched early delays what is due, but AVX2 gains a tenth from float32 operands fetched while
  // it draws.
  const bool ahead = on_intel;
  const int64_t most = ahead ? kFewDrawn : kDrawn;
  constexpr bool fetched = FOGZO_ISA == 256 && L == Dtype::float32 && G == Dtype::float32;
  DrawnNoise<D, kernel.PAIRS> noise;
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t count = run.drawn_at(i, most);
    if (fetched && !ahead)
      noise.draw(stream, run.chunk_at(i), count, static_cast<const float *>(kernel.latent) + i,
                 static_cast<const float *>(kernel.grad) + i);
    else
      noise.draw(stream, run.chunk_at(i), count);
#pragma GCC unroll 1
    for (int64_t h = 0; h < count; ++h, i += 2 * kWidth) {
      if (ahead)
        kernel.prefetch_operands(i, kAhead / 2);
      kernel.two(noise.get(h), i, scale, scale);
    }
  }
}

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH>
__attribute__((noinline)) void perturb_batch(const Operands &item, const Perturbation &p, const Keys &keys,
                                             const Batch &batch) {
  PerturbVectors<D, L, G, O, BOTH, false> kernel(item, p);
  constexpr bool PAIRS = kernel.PAIRS;
  const int64_t begin = batch.begin - batch.skip;
  Buffer<L> latent;
  Buffer<G> grad;
  Buffer<O> plus, minus;
  if (!batch.full()) {
    kernel.latent = latent.filled(kernel.latent, batch);
    kernel.grad = grad.filled(kernel.grad, batch);
    kernel.plus = plus.at(batch);
    kernel.minus = minus.at(batch);
  }
  DrawnNoise<D, PAIRS> noise;
  noise.draw_batch(keys, batch.chunk);
  const F delta = read<F>(batch.delta), inv = 1.0f / delta;
  const auto scale = [&](int k) { return kernel.scale(spread<PAIRS>(delta, k), spread<PAIRS>(inv, k)); };
#pragma GCC unroll 4
  for (int h = 0; h < kHalves; ++h) {
    const int64_t i = begin + 2 * kWidth * h;
    if (batch.full()) // else the operands lie in buffers
      kernel.prefetch_operands(i, kAhead);
    const PerturbScale s0 = scale(2 * h), s1 = PAIRS ? s0 : scale(2 * h + 1);
    kernel.two(noise.get(h), i, s0, s1);
  }
  if (!batch.full()) {
    plus.write(item.plus.data, batch);
    if (BOTH)
      minus.write(item.minus.data, batch);
  }
}

template <Distribution D, bool BOTH, Dtype L, Dtype G, Dtype O>
void perturb_vectors(Dtypes<L, G, O>, const Operands &item, const Perturbation &p, int64_t begin, int64_t end) {
  const auto perturb = O != Dtype::int8 && fit_a_table(p.grid) ? perturb_run<D, L, G, O, BOTH, O != Dtype::int8>
                                                               : perturb_run<D, L, G, O, BOTH, false>;
  Stream stream(names_in(p.noise, item));
  for_each_run(
      item, p.r, begin, end,
      [&](const Run &run) {
        stream.turn_to(run.chunk, p.noise.names.direction);
        perturb(item, p, stream, run);
      },
      [&](const Batch &batch) { perturb_batch<D, L, G, O, BOTH>(item, p, stream.keys, batch); });
}

// False where vectors have no kernel for the operands' dtypes.
bool perturb_by_vectors(const Operands &item, const Perturbation &p, int64_t begin, int64_t end) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16, int8 = Dtype::int8;
  return with_value(p.noise.distribution, [&](auto distribution) {
    constexpr Distribution D = decltype(distribution)::value;
    return with_dtypes<Dtypes<f32, f32, f32>, Dtypes<bf16, bf16, bf16>, Dtypes<f16, f16, f16>,
                       Dtypes<f32, bf16, bf16>, Dtypes<f32, f32, bf16>, Dtypes<bf16, bf16, int8>,
                       Dtypes<f32, f32, int8>>(
        [&](auto dtypes) {
          if (item.minus.data)
            perturb_vectors<D, true>(dtypes, item, p, begin, end);
          else
            perturb_vectors<D, false>(dtypes, item, p, begin, end);
        },
        item.latent.dtype, item.grad.dtype, item.plus.dtype);
  });
}
#endif

// plus, and minus where it is given
void perturb_plain(const Operands &item, const Perturbation &p, int64_t begin, int64_t end) {
#if FOGZO_ISA
  if (!better_by_tiles(item) && perturb_by_vectors(item, p, begin, end))
    return;
#endif
  perturb_loops(item, p, begin, end);
}

// With a transform: the guide moves the weight as it is, the noise the rotated one.
void perturb_rotated(const Operands &item, const Perturbation &given, int64_t begin, int64_t end) {
  Perturbation p = given;
  float latent[kTile], grad[kTile], x[kTile];
  const float zeros[kTile] = {}, a = given.a;
  p.a = 0.0f;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent), *g = load(item.grad, start, count, grad);
    Operands tile = item;
    tile.latent = tile_span(x, start);
    tile.grad = tile_span(zeros, start);
    tile.minus = {};
    const auto write_side = [&](const Span &span, float eps) {
      if (!span.data)
        return;
      for_each_scale(item, p.r, start, count, [&](int64_t first, int64_t last, Scale scale) {
        const float step = eps * (a * scale.delta) * scale.delta;
        FOGZO_LOOP(int64_t i = first; i < last; ++i) x[i] = std::fma(step, g[i], t[i]);
      });
      rotate(x, x, count, item.block);
      p.epsilon = eps;
      tile.plus = span;
      perturb_plain(tile, p, start, start + count);
    };
    write_side(item.plus, given.epsilon);
    write_side(item.minus, -given.epsilon);
  });
}

void perturb_range(const Operands &item, const Perturbation &p, int64_t begin, int64_t end) {
  if (!item.plus.data) {
    Operands single = item;
    Perturbation opposite = p;
    single.plus = item.minus, single.minus = {};
    opposite.epsilon = -p.epsilon;
    return perturb_range(single, opposite, begin, end);
  }
  (item.block ? perturb_rotated : perturb_plain)(item, p, begin, end);
}

} // namespace
} // namespace fogzo::cpu
