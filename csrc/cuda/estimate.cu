// G in place of g: fma(A, g, inv sum_i B_i m_i), all directions in one pass. One launch makes the
// coefficients of the losses, one is over all tensors.
#include "estimate.cuh"
#include "launch.cuh"
#include "losses.cuh"

namespace fogzo::cuda {

// Of the coefficients: A, 1 if g must stay as it is, B_0, B_1, ...
struct EstimateCoefficients {
  LossesSource losses;
  float *out;
};

FOGZO_KERNEL(1, 1) coefficients_kernel(FOGZO_PARAMETER EstimateCoefficients p) {
  const Coefficients found = read_losses(p.losses, p.out + kEstimateCoefficients);
  p.out[0] = found.A;
  p.out[1] = found.usable ? 0.0f : 1.0f;
}

template <Distribution D, int Count, bool Plain>
FOGZO_DEVICE void estimate_chunks(const Estimate &p, const EstimateNames &names, const Layout &layout,
                                  const Scales &scales, char *grad, int c, Dtype dtype) {
  Raw raw[Count];
  float acc[Count][kChunk] = {};
#pragma unroll
  for (int k = 0; k < Count; ++k)
    raw[k] = load_chunk<(Count > 1)>(grad, c + k * kThreads, dtype);
#pragma unroll 1
  for (int i = 0; i < p.directions; ++i) {
    const float B = *global(names.B + i);
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      float m[kChunk];
      const int64_t chunk = chunk_number<Plain>(layout, c + k * kThreads);
      scaled_noise<D>(words_of(chunk, uint32_t(i), names.step, names.tensor_id, names.keys), m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        acc[k][j] = std::fma(B, m[j], acc[k][j]);
    }
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    float g[kChunk];
    widen(raw[k], dtype, g);
    const float inv = chunk_scale<Plain>(scales, c + k * kThreads).inv;
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      g[j] = estimate_of(names.A, g[j], inv, acc[k][j]);
    store_chunk<(Count > 1)>(grad, c + k * kThreads, g, dtype);
  }
}

template <Distribution D>
FOGZO_DEVICE void estimate_rest(const Estimate &p, const Part &part, const EstimateNames &names, Dtype dtype) {
  const int64_t end = part.end();
  void *grad = part.pointer<void>(GRAD);
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const int64_t e = element_number(part, j);
    float acc = 0.0f;
#pragma unroll 1
    for (int i = 0; i < p.directions; ++i)
      acc = std::fma(*global(names.B + i),
                     scaled_element<D>(e, uint32_t(i), names.step, names.tensor_id, names.keys), acc);
    const float inv = element_scale(part, j, p.r).inv;
    store_element(grad, j, estimate_of(names.A, load_element(grad, j, dtype), inv, acc), dtype);
  }
}

template <Distribution D, Dtype G, bool Plain>
FOGZO_DEVICE void estimate_part(const Estimate &p, const Part &part) {
  const EstimateNames names = estimate_names<Plain>(p, part);
  const Layout layout = layout_of<Plain>(part);
  const Scales scales = scales_of<Plain>(part, p.r);
  char *grad = part.address(GRAD, bytes_of(G));
  const int chunks = part.chunks(), wide = part.aligned() ? chunks : 0;
  int c = thread();
#pragma unroll 1
  for (; c + kThreads < wide; c += 2 * kThreads)
    estimate_chunks<D, 2, Plain>(p, names, layout, scales, grad, c, G);
#pragma unroll 1
  for (; c < chunks; c += kThreads)
    estimate_chunks<D, 1, Plain>(p, names, layout, scales, grad, c, G);
  estimate_rest<D>(p, part, names, G);
}

template <Distribution D, Dtype G, bool Plain>
FOGZO_KERNEL(kThreads, Plain ? 6 : 4)
estimate_kernel(FOGZO_PARAMETER Estimate p) {
  const Part part = part_of(p.tables);
  if (p.coefficients[1] == 0.0f)
    estimate_part<D, G, Plain>(p, part);
  count_bad_alphas<Plain>(p.counters, part);
}

using EstimateKernel = void (*)(Estimate);

template <Distribution D> EstimateKernel estimate_for(Dtype grad, bool plain) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, f16 = Dtype::float16;
  if (grad == f32)
    return plain ? estimate_kernel<D, f32, true> : estimate_kernel<D, f32, false>;
  if (grad == b16)
    return plain ? estimate_kernel<D, b16, true> : estimate_kernel<D, b16, false>;
  return plain ? estimate_kernel<D, f16, true> : estimate_kernel<D, f16, false>;
}

void estimate_gradient(const Where &where, const Plan &plan, Dtype grad, const Draw &draw, const Losses &losses,
                       float r, float *coefficients, int block) {
  launch("coefficients_kernel", coefficients_kernel, where, 1, 1,
         EstimateCoefficients{losses_of(draw, losses), coefficients});
  const bool plain = plan.per_tensor && !plan.shard && draw.step.on_host();
  const Estimate p{
      tables_of(plan), source_of(draw.step), coefficients, int(losses.n), r, losses.counters, grad};
  with_value(draw.distribution, [&](auto D) {
    if (block)
      return launch("rotated_estimate_kernel", rotated_estimate_for<decltype(D)::value>(grad, block), where,
                    plan.blocks, kThreads, Rotated<Estimate>{p, rotation_of(block)});
    launch("estimate_kernel", estimate_for<decltype(D)::value>(grad, plain), where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
