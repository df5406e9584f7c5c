// G of gradients (docs/contract.md, section 4), and the fused tail: G, the optimizer's step and Q in one pass.
// The estimate reads grad and writes plus, which may be the same memory.
#pragma once

#include "quantize.h"

namespace fogzo::cpu {
namespace {

void estimate_loops(const Operands &item, const Estimate &e, int64_t begin, int64_t end) {
  float m[kTile], acc[kTile], grad[kTile], out[kTile];
  const float A = e.A;
  Noise noise{e.noise.distribution, names_in(e.noise, item)};
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    for (int64_t direction = 0; direction < e.directions; ++direction) {
      noise.names.direction = uint32_t(direction);
      noise_tile(noise, item.layout, start, count, m);
      const float B = e.B[direction];
      if (direction == 0)
        FOGZO_LOOP(int64_t i = 0; i < count; ++i) acc[i] = B * m[i];
      else
        FOGZO_LOOP(int64_t i = 0; i < count; ++i) acc[i] = std::fma(B, m[i], acc[i]);
    }
    const float *g = load(item.grad, start, count, grad);
    float *to = target(item.plus, start, out);
    for_each_scale(item, e.r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = estimate_of(A, g[i], scale.inv, acc[i]);
    });
    store(to, item.plus, start, count);
  });
}

#if FOGZO_ISA
// B m, added to the sum of what begun directions gave
inline F with_noise(F B, F m, bool begun, const F &sum) { return begun ? fused(B, m, sum) : B * m; }

// Of `count` vectors of halves from element i on: draw(noise, direction) draws them, inv_at(k) is 1 / delta of
// vector k.
template <Distribution D, Dtype G, Dtype O, class Draw, class InvAt>
inline __attribute__((always_inline)) void estimate_vectors(const void *grad, void *out, const Estimate &e,
                                                            int64_t i, int64_t count, Draw draw, InvAt inv_at) {
  constexpr bool PAIRS = in_pairs<G>(O);
  const F A = broadcast(e.A);
  DrawnNoise<D, PAIRS> noise;
  F acc[2 * kDrawn];
  for (int64_t direction = 0; direction < e.directions; ++direction) {
    draw(noise, uint32_t(direction));
    const F B = broadcast(e.B[direction] / kNoiseFactor<D>);
    const bool last = direction + 1 == e.directions;
    for (int64_t h = 0; h < count; ++h) {
      const Two m = noise.get(h);
      const F a0 = with_noise(B, m.first, direction, acc[2 * h]),
              a1 = with_noise(B, m.last, direction, acc[2 * h + 1]);
      if (!last) {
        acc[2 * h] = a0, acc[2 * h + 1] = a1;
        continue;
      }
      const int64_t j = i + 2 * kWidth * h;
      prefetch<G, 1>(grad, j);
      const Two g = load_two<G, PAIRS>(grad, j);
      store_two<O, PAIRS, Narrow::any>(out, j, estimate_of(A, g.first, inv_at(2 * h), a0),
                                       estimate_of(A, g.last, inv_at(PAIRS ? 2 * h : 2 * h + 1), a1));
    }
  }
}

template <Distribution D, Dtype G, Dtype O>
__attribute__((noinline)) void estimate_run(Dtypes<G, O>, const Operands &item, const Estimate &e,
                                            Stream &stream, const Run &run) {
  const F inv = broadcast(run.scale.inv);
  const int64_t most = on_intel && G == Dtype::float32 ? kFewDrawn : kDrawn; // as perturb_run()
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t count = run.drawn_at(i, most);
    const auto draw = [&](auto &noise, uint32_t direction) {
      stream.turn_to(run.chunk, direction);
      noise.draw(stream, run.chunk_at(i), count);
    };
    estimate_vectors<D, G, O>(item.grad.data, item.plus.data, e, i, count, draw, [&](int64_t) { return inv; });
    i += count * 2 * kWidth;
  }
}

template <Distribution D, Dtype G, Dtype O>
__attribute__((noinline)) void estimate_batch(Dtypes<G, O>, const Operands &item, const Estimate &e, Keys &keys,
                                              const Batch &batch) {
  const F inv = 1.0f / read<F>(batch.delta);
  const auto draw = [&](auto &noise, uint32_t direction) {
    keys.turn_to(direction);
    noise.draw_batch(keys, batch.chunk);
  };
  const auto estimate = [&](const void *in, void *to) {
    estimate_vectors<D, G, O>(in, to, e, batch.begin - batch.skip, kHalves, draw,
                              [&](int64_t k) { return spread<in_pairs<G>(O)>(inv, int(k)); });
  };
  if (batch.full())
    return estimate(item.grad.data, item.plus.data);
  Buffer<G> grad;
  Buffer<O> out;
  estimate(grad.filled(item.grad.data, batch), out.at(batch));
  out.write(item.plus.data, batch);
}

// False where vectors have no kernel for the operands' dtypes.
bool estimate_by_vectors(const Operands &item, const Estimate &e, int64_t begin, int64_t end) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16;
  return with_value(e.noise.distribution, [&](auto distribution) {
    constexpr Distribution D = decltype(distribution)::value;
    return with_dtypes<Dtypes<f32, f32>, Dtypes<bf16, f32>, Dtypes<bf16, bf16>, Dtypes<f16, f32>,
                       Dtypes<f16, f16>>(
        [&](auto dtypes) {
          Stream stream(names_in(e.noise, item));
          for_each_run(
              item, e.r, begin, end, [&](const Run &run) { estimate_run<D>(dtypes, item, e, stream, run); },
              [&](const Batch &batch) { estimate_batch<D>(dtypes, item, e, stream.keys, batch); });
        },
        item.grad.dtype, item.plus.dtype);
  });
}
#endif

void estimate_plain(const Operands &item, const Estimate &e, int64_t begin, int64_t end) {
#if FOGZO_ISA
  if (!better_by_tiles(item) && estimate_by_vectors(item, e, begin, end))
    return;
#endif
  estimate_loops(item, e, begin, end);
}

void estimate_range(const Operands &item, const Estimate &e, int64_t begin, int64_t end) {
  if (!item.block)
    return estimate_plain(item, e, begin, end);
  float grad[kTile], out[kTile];
  Estimate noise_alone = e;
  noise_alone.A = 1.0f; // of a gradient of zeros: inv acc
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    float noise[kTile] = {};
    Operands tile = item;
    tile.grad = tile.plus = tile_span(noise, start);
    estimate_plain(tile, noise_alone, start, start + count);
    rotate(noise, noise, count, item.block);
    const float *g = load(item.grad, start, count, grad), A = e.A;
    float *to = target(item.plus, start, out);
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = std::fma(A, g[i], noise[i]);
    store(to, item.plus, start, count);
  });
}

void estimate_in_place(const Operands &item, const Estimate &e, int64_t begin, int64_t end) {
  Operands both = item;
  both.plus = item.grad;
  estimate_range(both, e, begin, end);
}

// ---- the fused tail

// the optimizer's step of a tile, in place
template <Rule R>
void step_tile(const Operands &item, Update update, const float *G, int64_t start, int64_t count) {
  float buffer[kTile], out[kTile], none[kTile];
  const Span &weight = item.master.data ? item.master : item.latent;
  const float *theta = load(weight, start, count, buffer);
  float *to = target(weight, start, out);
  float *first = states_of(R) > 0 ? static_cast<float *>(item.first.data) + start : none;
  float *second = states_of(R) > 1 ? static_cast<float *>(item.second.data) + start : none;
  FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = updated<R>(update, theta[i], G[i], first[i], second[i]);
  store(to, weight, start, count);
  if (item.master.data)
    store(to, item.latent, start, count);
}

void update_range(const Operands &item, const Tail &tail, int64_t begin, int64_t end) {
  float G[kTile];
  const bool drawn = item.alpha && tail.estimate.directions;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    if (!tail.skip) {
      Operands tile = item;
      tile.plus = tile_span(G, start);
      if (drawn)
        estimate_range(tile, tail.estimate, start, start + count);
      const float *g = drawn ? G : load(item.grad, start, count, G);
      with_value(tail.update.rule,
                 [&](auto R) { step_tile<decltype(R)::value>(item, tail.update, g, start, count); });
    }
    if (item.plus.data) // while the tile is in the cache
      quantize_range(item, tail.grid, tail.estimate.r, start, start + count);
  });
}

} // namespace
} // namespace fogzo::cpu
