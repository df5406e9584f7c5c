// Q(theta) into PLUS; and g h'(theta) into PLUS, which may be GRAD. Both also around a transform.
#include "hadamard.cuh"
#include "launch.cuh"

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
    raw[k] = load_chunk<(Count > 1)>(latent, c + k * kThreads, latent_t);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    float x[kChunk];
    widen(raw[k], latent_t, x);
    const Scale scale = chunk_scale<false>(scales, c + k * kThreads);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = position(x[i], scale.inv, p.grid);
    store_quantized<(Count > 1)>(out, c + k * kThreads, x, scale.delta, p.grid, out_t);
  }
}

template <Dtype L, Dtype O> FOGZO_KERNEL(kThreads, 8) quantize_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtype latent_t = actual<L>(p.dtypes.latent), out_t = actual<O>(p.dtypes.out);
  const Part part = part_of(p.tables);
  const Scales scales = scales_of<false>(part, p.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = part.chunks(), wide = part.aligned() ? chunks : 0;
  int c = thread();
#pragma unroll 1
  for (; c + kThreads < wide; c += 2 * kThreads)
    quantize_chunks<2>(p, scales, latent, out, c, latent_t, out_t);
#pragma unroll 1
  for (; c < chunks; c += kThreads)
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

template <StraightThrough Kind, bool Aligned>
FOGZO_DEVICE void backward_chunks(const Quantize &p, const Part &part, Dtype latent_t, Dtype grad_t,
                                  Dtype out_t) {
  const Scales scales = scales_of<false>(part, p.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t)), *grad = part.address(GRAD, bytes_of(grad_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = part.chunks();
#pragma unroll 1
  for (int c = thread(); c < chunks; c += kThreads) {
    float theta[kChunk], g[kChunk];
    const Raw raw = load_chunk<Aligned>(latent, c, latent_t), raw_g = load_chunk<Aligned>(grad, c, grad_t);
    widen(raw, latent_t, theta);
    widen(raw_g, grad_t, g);
    const Scale scale = chunk_scale<false>(scales, c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      g[i] = derived<Kind>(g[i], theta[i], scale, p.grid);
    store_chunk<Aligned>(out, c, g, out_t);
  }
}

template <StraightThrough Kind, Dtype T> FOGZO_KERNEL(kThreads, 8) backward_kernel(FOGZO_PARAMETER Quantize p) {
  const Dtype latent_t = actual<T>(p.dtypes.latent), grad_t = actual<T>(p.dtypes.grad);
  const Dtype out_t = actual<T>(p.dtypes.out);
  const Part part = part_of(p.tables);
  if (part.aligned())
    backward_chunks<Kind, true>(p, part, latent_t, grad_t, out_t);
  else
    backward_chunks<Kind, false>(p, part, latent_t, grad_t, out_t);
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const float theta = load_element(part.pointer<void>(LATENT), j, latent_t);
    const float g = load_element(part.pointer<void>(GRAD), j, grad_t);
    store_element(part.pointer<void>(PLUS), j,
                  derived<Kind>(g, theta, element_scale(part, j, p.grid.r), p.grid), out_t);
  }
}

// ---- around a transform

template <bool Far, bool Aligned>
FOGZO_DEVICE void rotated_quantize(const Rotated<Quantize> &p, const Part &part, Dtype latent_t, Dtype out_t) {
  const Scales scales = scales_of<false>(part, p.op.grid.r);
  const char *latent = part.address(LATENT, bytes_of(latent_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = all_chunks(part);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kPairs) {
    const TwoChunks c = two_chunks(p.rotation, turn, chunks);
    float x[2][kChunk];
    load_widened<Aligned>(latent, c.first, latent_t, x[0]);
    load_widened<Aligned>(latent, c.second, latent_t, x[1]);
    const Scale scale = chunk_scale<false>(scales, c.first); // of both: a block has one
    rotate<Far>(x, p.rotation);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[0][i] = position(x[0][i], scale.inv, p.op.grid);
      x[1][i] = position(x[1][i], scale.inv, p.op.grid);
    }
    if (c.some) {
      store_quantized<Aligned>(out, c.first, x[0], scale.delta, p.op.grid, out_t);
      store_quantized<Aligned>(out, c.second, x[1], scale.delta, p.op.grid, out_t);
    }
  }
}

template <Dtype L, Dtype O, bool Far>
FOGZO_KERNEL(kThreads, 8)
rotated_quantize_kernel(FOGZO_PARAMETER Rotated<Quantize> p) {
  const Dtype latent_t = actual<L>(p.op.dtypes.latent), out_t = actual<O>(p.op.dtypes.out);
  const Part part = part_of(p.op.tables);
  if (part.aligned())
    rotated_quantize<Far, true>(p, part, latent_t, out_t);
  else
    rotated_quantize<Far, false>(p, part, latent_t, out_t);
}

// H(g h'), h' that at the rotated weight.
template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE void rotated_backward(const Rotated<Quantize> &p, const Part &part, const Dtypes &t) {
  const Scales scales = scales_of<false>(part, p.op.grid.r);
  const char *latent = part.address(LATENT, bytes_of(t.latent)), *grad = part.address(GRAD, bytes_of(t.grad));
  char *out = part.address(PLUS, bytes_of(t.out));
  const int chunks = all_chunks(part);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kPairs) {
    const TwoChunks c = two_chunks(p.rotation, turn, chunks);
    float x[2][kChunk], g[2][kChunk] = {};
    load_widened<Aligned>(latent, c.first, t.latent, x[0]);
    load_widened<Aligned>(latent, c.second, t.latent, x[1]);
    if (c.some) { // else the block's first chunk, which its own thread may be writing
      load_widened<Aligned>(grad, c.first, t.grad, g[0]);
      load_widened<Aligned>(grad, c.second, t.grad, g[1]);
    }
    const Scale scale = chunk_scale<false>(scales, c.first); // of both: a block has one
    rotate<Far>(x, p.rotation);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      g[0][i] = derived<Kind>(g[0][i], x[0][i], scale, p.op.grid);
      g[1][i] = derived<Kind>(g[1][i], x[1][i], scale, p.op.grid);
    }
    rotate<Far>(g, p.rotation);
    if (c.some) {
      store_chunk<Aligned>(out, c.first, g[0], t.out);
      store_chunk<Aligned>(out, c.second, g[1], t.out);
    }
  }
}

template <StraightThrough Kind, Dtype T, bool Far>
FOGZO_KERNEL(kThreads, 6)
rotated_backward_kernel(FOGZO_PARAMETER Rotated<Quantize> p) {
  const Dtypes &given = p.op.dtypes;
  const Dtypes types{actual<T>(given.latent), actual<T>(given.grad), actual<T>(given.out)};
  const Part part = part_of(p.op.tables);
  if (part.aligned())
    rotated_backward<Kind, Far, true>(p, part, types);
  else
    rotated_backward<Kind, Far, false>(p, part, types);
}

// The common dtypes are compiled for blocks within a warp; any other pair is told when it runs.
template <StraightThrough Kind> void (*rotated_backward_for(const Dtypes &t, int block))(Rotated<Quantize>) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto all = [&](Dtype one) {
    return !between_warps(block) && t.latent == one && t.grad == one && t.out == one;
  };
  return all(f32)   ? rotated_backward_kernel<Kind, f32, false>
         : all(b16) ? rotated_backward_kernel<Kind, b16, false>
                    : rotated_backward_kernel<Kind, any, true>;
}

void (*rotated_quantize_for(const Dtypes &t, int block))(Rotated<Quantize>) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto is = [&](Dtype latent, Dtype out) {
    return !between_warps(block) && t.latent == latent && t.out == out;
  };
  return is(f32, f32)   ? rotated_quantize_kernel<f32, f32, false>
         : is(f32, b16) ? rotated_quantize_kernel<f32, b16, false>
         : is(b16, b16) ? rotated_quantize_kernel<b16, b16, false>
                        : rotated_quantize_kernel<any, any, true>;
}

// ---- launches

void quantize(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid, int block) {
  const Quantize p{tables_of(plan), grid, dtypes};
  if (block)
    return launch("rotated_quantize_kernel", rotated_quantize_for(dtypes, block), where, plan.blocks, kThreads,
                  Rotated<Quantize>{p, rotation_of(block)});
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, i8 = Dtype::int8, any = Dtype::any;
  const auto is = [&](Dtype latent, Dtype out) { return dtypes.latent == latent && dtypes.out == out; };
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

void straight_through_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                               StraightThrough kind, int block) {
  const Quantize p{tables_of(plan), grid, dtypes};
  with_value(kind, [&](auto S) {
    if (block)
      return launch("rotated_backward_kernel", rotated_backward_for<decltype(S)::value>(dtypes, block), where,
                    plan.blocks, kThreads, Rotated<Quantize>{p, rotation_of(block)});
    launch("backward_kernel", backward_for<decltype(S)::value>(dtypes), where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
