// The ops of quantizers with a transform (docs/contract.md, section 4): the plain kernels on tiles that were
// rotated before, and a rotation of what they give. Compiled for each instruction set, like tiles.h; it comes
// last.

using PerturbRange = decltype(Kernels::perturb);
using EstimateRange = decltype(Kernels::estimate);
using UpdateRange = decltype(Kernels::update);

// The guide moves the weight as it is, the noise the rotated one.
template <PerturbRange perturb>
void rotated_perturb(const Item &item, const Perturbation &given, int64_t begin, int64_t end) {
  if (!item.block)
    return perturb(item, given, begin, end);
  Perturbation p = given;
  float latent[kTile], grad[kTile], x[kTile];
  const float zeros[kTile] = {}, a = given.a;
  p.a = 0.0f;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent), *g = load(item.grad, start, count, grad);
    Item tile = item;
    tile.latent = tile_span(x, start);
    tile.grad = tile_span(zeros, start);
    tile.minus = {};
    for (const Span *out : {&item.plus, &item.minus}) {
      if (!out->data)
        continue;
      p.epsilon = out == &item.plus ? given.epsilon : -given.epsilon;
      for_each_scale(item, p.r, start, count, [&](int64_t first, int64_t last, Scale scale) {
        const float step = p.epsilon * (a * scale.delta) * scale.delta;
        FOGZO_LOOP(int64_t i = first; i < last; ++i) x[i] = std::fma(step, g[i], t[i]);
      });
      rotate(x, x, count, item.block);
      tile.plus = *out;
      perturb(tile, p, start, start + count);
    }
  });
}

// G of a tile into out, which may be g
template <EstimateRange estimate>
void rotated_estimate_tile(const Item &item, Estimate e, const float *g, int64_t start, int64_t count,
                           float *out) {
  float noise[kTile] = {};
  Item tile = item;
  tile.grad = tile_span(noise, start);
  const float A = e.A;
  e.A = 1.0f;
  estimate(tile, e, start, start + count); // 1 * 0 + inv acc
  rotate(noise, noise, count, item.block);
  FOGZO_LOOP(int64_t i = 0; i < count; ++i) out[i] = std::fma(A, g[i], noise[i]);
}

template <EstimateRange estimate>
void rotated_estimate(const Item &item, const Estimate &e, int64_t begin, int64_t end) {
  if (!item.block)
    return estimate(item, e, begin, end);
  float grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    float *to = target(item.grad, start, out);
    rotated_estimate_tile<estimate>(item, e, load(item.grad, start, count, grad), start, count, to);
    store(to, item.grad, start, count);
  });
}

void rotated_quantize(const Item &item, GridRange grid, float r, int64_t begin, int64_t end) {
  if (!item.block)
    return quantize_range(item, grid, r, begin, end);
  float latent[kTile], x[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    rotate(load(item.latent, start, count, latent), x, count, item.block);
    Item tile = item;
    tile.latent = tile_span(x, start);
    quantize_range(tile, grid, r, start, start + count);
  });
}

template <UpdateRange update, EstimateRange estimate>
void rotated_update(const Item &item, const Tail &tail, int64_t begin, int64_t end) {
  if (!item.block)
    return update(item, tail, begin, end);
  float grad[kTile], out[kTile];
  const bool drawn = tail.estimate.directions;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    if (!tail.skip) {
      const float *G = load(item.grad, start, count, grad);
      if (drawn) {
        rotated_estimate_tile<estimate>(item, tail.estimate, G, start, count, out);
        G = out;
      }
      step_tile(item, tail.update, G, start, count);
    }
    if (item.plus.data)
      rotated_quantize(item, tail.grid, tail.estimate.r, start, start + count);
  });
}

void rotated_straight_through(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin,
                              int64_t end) {
  if (!item.block)
    return straight_through_range(item, kind, grid, r, begin, end);
  float latent[kTile], x[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    rotate(load(item.latent, start, count, latent), x, count, item.block);
    Item tile = item;
    tile.latent = tile_span(x, start);
    tile.plus = tile_span(out, start);
    straight_through_range(tile, kind, grid, r, start, start + count);
    rotate(out, out, count, item.block);
    store(out, item.plus, start, count);
  });
}

template <PerturbRange perturb, EstimateRange estimate, UpdateRange update, decltype(Kernels::learned) learned>
constexpr Kernels table_of(const char *isa) {
  return {isa,
          noise_range,
          sumsq_range,
          rotated_perturb<perturb>,
          rotated_estimate<estimate>,
          rotated_update<update, estimate>,
          rotated_quantize,
          rotated_straight_through,
          measure_range,
          total_range,
          learned,
          hadamard_range};
}
