// u = C m, float32, into PLUS; and the factor of each distribution's noise.
#include "launch.cuh"
#include "noise.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct NoiseOp {
  Tables tables;
  Source source;
  uint32_t direction;
  float scale; // C over the noise's factor
};

template <Distribution D> FOGZO_KERNEL(kThreads, 8) noise_kernel(FOGZO_PARAMETER NoiseOp p) {
  const Part part = part_of(p.tables);
  const Keys keys = keys_of<false>(p.source);
  const uint32_t step = step_of<false>(p.source), tensor_id = uint32_t(part[TENSOR_ID]);
  const Layout layout = layout_of<false>(part);
  char *out = part.address(PLUS, 4);
  const int chunks = part.chunks();
#pragma unroll 1
  for (int c = thread(); c < chunks; c += kThreads) {
    float m[kChunk];
    scaled_noise<D>(words_of(chunk_number<false>(layout, c), p.direction, step, tensor_id, keys), m);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      m[i] *= p.scale;
    store_chunk<true>(out, c, m, Dtype::float32);
  }
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const float m = scaled_element<D>(element_number(part, j), p.direction, step, tensor_id, keys);
    store_element(part.pointer<void>(PLUS), j, m * p.scale, Dtype::float32);
  }
}

double noise_factor(Distribution distribution) {
  return with_value(distribution, [](auto D) { return Scaled<decltype(D)::value>::factor; });
}

void noise(const Where &where, const Plan &plan, const Draw &draw, uint32_t direction) {
  const float scale = float(draw.C / noise_factor(draw.distribution));
  const NoiseOp p{tables_of(plan), source_of(draw.step), direction, scale};
  with_value(draw.distribution, [&](auto D) {
    launch("noise_kernel", noise_kernel<decltype(D)::value>, where, plan.blocks, kThreads, p);
  });
}

} // namespace fogzo::cuda
