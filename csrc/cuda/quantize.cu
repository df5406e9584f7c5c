// Q(theta) into PLUS; and g h'(theta) into PLUS, which may be GRAD.
#include "hadamard.cuh"
#include "launch.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct Quantize {
  Tables tables;
  Grid grid;
  Dtypes dtypes;
};

template <int Count>
FOGZO_DEVICE void quantize_chunks(const Quantize &p, const Scales &scales, const char *latent, char *out, int c,
                                  Dtype latent_t, Dtype out_t) {
  Raw raw[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k)
    raw[k] = load_chunk(latent, c + k * kThreads, latent_t);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    float x[kChunk];
    widen(raw[k], latent_t, x);
    const Scale scale = chunk_scale<false>(scales, c + k * kThreads);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = position(x[i], scale.inv, p.grid);
    store_quantized(out, c + k * kThreads, x, scale.delta, p.grid, out_t);
  }
}

template <Dtype L, Dtype O> FOGZO_KERNEL(kThreads, 8) quantize_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtype latent_t = actual<L>(p.dtypes.latent), out_t = actual<O>(p.dtypes.out);
  const Part part = part_of(p.tables);
  const Scales scales = scales_of<false>(part, p.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = part.chunks();
  int c = thread();
#pragma unroll 1
  for (; c + kThreads < chunks; c += 2 * kThreads)
    quantize_chunks<2>(p, scales, latent, out, c, latent_t, out_t);
  if (c < chunks)
    quantize_chunks<1>(p, scales, latent, out, c, latent_t, out_t);
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const Scale scale = element_scale(part, j, p.grid.r);
    const float theta = load_element(part.pointer<void>(LATENT), j, latent_t);
    store_quantized_element(part.pointer<void>(PLUS), j, position(theta, scale.inv, p.grid), scale.delta,
                            p.grid, out_t);
  }
}

template <StraightThrough Kind>
FOGZO_DEVICE float derived(float g, float theta, const Scale &scale, const Grid &grid) {
  return g * derivative_of<Kind>(theta, scale, {grid.qmin, grid.qmax, grid.offset}, grid.r);
}

template <StraightThrough Kind, Dtype T> FOGZO_KERNEL(kThreads, 8) backward_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtype latent_t = actual<T>(p.dtypes.latent), grad_t = actual<T>(p.dtypes.grad);
  const Dtype out_t = actual<T>(p.dtypes.out);
  const Part part = part_of(p.tables);
  const Scales scales = scales_of<false>(part, p.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t)), *grad = part.address(GRAD, bytes_of(grad_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = part.chunks();
#pragma unroll 1
  for (int c = thread(); c < chunks; c += kThreads) {
    float theta[kChunk], g[kChunk];
    const Raw raw = load_chunk(latent, c, latent_t), raw_g = load_chunk(grad, c, grad_t);
    widen(raw, latent_t, theta);
    widen(raw_g, grad_t, g);
    const Scale scale = chunk_scale<false>(scales, c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      g[i] = derived<Kind>(g[i], theta[i], scale, p.grid);
    store_chunk(out, c, g, out_t);
  }
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const float theta = load_element(part.pointer<void>(LATENT), j, latent_t);
    const float g = load_element(part.pointer<void>(GRAD), j, grad_t);
    store_element(part.pointer<void>(PLUS), j,
                  derived<Kind>(g, theta, element_scale(part, j, p.grid.r), p.grid), out_t);
  }
}

template <int Block, bool Aligned>
FOGZO_DEVICE void rotated_quantize(const Quantize &p, const Part &part, const Dtypes &t) {
  const Scales scales = scales_of<false>(part, p.grid.r);
  every_chunk(part, [&](int c, bool some) {
    float x[kChunk];
    load_part<Aligned>(part, LATENT, c, t.latent, x);
    transform_of<Block>(x, p.grid.block);
    const Scale scale = chunk_scale<false>(scales, c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = position(x[i], scale.inv, p.grid);
    if (some)
      quantize_part<Aligned>(part, PLUS, c, t.out, x, scale, p.grid);
  });
}

template <Dtype L, Dtype O, int Block>
FOGZO_KERNEL(kThreads, 8)
rotated_quantize_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtypes types{actual<L>(p.dtypes.latent), p.dtypes.grad, actual<O>(p.dtypes.out)};
  const Part part = part_of(p.tables);
  if (part[FAST])
    rotated_quantize<Block, true>(p, part, types);
  else
    rotated_quantize<Block, false>(p, part, types);
}

// h' is taken of the rotated latent; the product goes back through the transform.
template <StraightThrough Kind, int Block, bool Aligned>
FOGZO_DEVICE void rotated_backward(const Quantize &p, const Part &part, const Dtypes &t) {
  const Scales scales = scales_of<false>(part, p.grid.r);
  every_chunk(part, [&](int c, bool some) {
    float x[kChunk], g[kChunk];
    load_part<Aligned>(part, LATENT, c, t.latent, x);
    load_part<Aligned>(part, GRAD, c, t.grad, g);
    transform_of<Block>(x, p.grid.block);
    const Scale scale = chunk_scale<false>(scales, c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      g[i] = derived<Kind>(g[i], x[i], scale, p.grid);
    transform_of<Block>(g, p.grid.block);
    if (some)
      store_part<Aligned>(part, PLUS, c, t.out, g);
  });
}

template <StraightThrough Kind, Dtype T, int Block>
FOGZO_KERNEL(kThreads, 8)
rotated_backward_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtypes types{actual<T>(p.dtypes.latent), actual<T>(p.dtypes.grad), actual<T>(p.dtypes.out)};
  const Part part = part_of(p.tables);
  if (part[FAST])
    rotated_backward<Kind, Block, true>(p, part, types);
  else
    rotated_backward<Kind, Block, false>(p, part, types);
}

void quantize(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, i8 = Dtype::int8, any = Dtype::any;
  const auto is = [&](Dtype latent, Dtype out) { return dtypes.latent == latent && dtypes.out == out; };
  const Quantize p{tables_of(plan), grid, dtypes};
  const bool common = grid.block == kCommonBlock;
  if (grid.block)
    return launch_with_barriers("rotated_quantize_kernel",
                                common && is(b16, b16)   ? rotated_quantize_kernel<b16, b16, kCommonBlock>
                                : common && is(f32, f32) ? rotated_quantize_kernel<f32, f32, kCommonBlock>
                                                         : rotated_quantize_kernel<any, any, 0>,
                                where, plan.blocks, kThreads, p);
  void (*kernel)(Quantize) = quantize_kernel<any, any>;
  if (is(f32, f32))
    kernel = quantize_kernel<f32, f32>;
  else if (is(b16, b16))
    kernel = quantize_kernel<b16, b16>;
  else if (is(f32, i8))
    kernel = quantize_kernel<f32, i8>;
  launch("quantize_kernel", kernel, where, plan.blocks, kThreads, p);
}

template <StraightThrough Kind> void (*backward_for(const Dtypes &t))(Quantize) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto all = [&](Dtype one) { return t.latent == one && t.grad == one && t.out == one; };
  return all(f32)   ? backward_kernel<Kind, f32>
         : all(b16) ? backward_kernel<Kind, b16>
                    : backward_kernel<Kind, any>;
}

template <StraightThrough Kind> void (*rotated_backward_for(const Dtypes &t, int block))(Quantize) {
  constexpr Dtype b16 = Dtype::bfloat16;
  const bool narrow = t.latent == b16 && t.grad == b16 && t.out == b16;
  return narrow && block == kCommonBlock ? rotated_backward_kernel<Kind, b16, kCommonBlock>
                                         : rotated_backward_kernel<Kind, Dtype::any, 0>;
}

void straight_through_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                               StraightThrough kind) {
  const Quantize p{tables_of(plan), grid, dtypes};
  with_value(kind, [&](auto S) {
    constexpr StraightThrough Kind = decltype(S)::value;
    if (grid.block)
      return launch_with_barriers("rotated_backward_kernel", rotated_backward_for<Kind>(dtypes, grid.block),
                                  where, plan.blocks, kThreads, p);
    launch("backward_kernel", backward_for<Kind>(dtypes), where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
