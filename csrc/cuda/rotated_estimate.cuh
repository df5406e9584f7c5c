// G = fma(A, g, H(inv sum_i B_i m_i)): noise is in the basis of the quantizer, g is not. For those
// distributions that rotated_kernels.cu compiles.
#pragma once

#include "estimate.cuh"

namespace fogzo::cuda {

// sum_i B_i m_i of two chunks.
template <Distribution D>
FOGZO_DEVICE void noise_sum_of_two(const Estimate &p, const EstimateNames &names, int64_t chunk, int half,
                                   float (&acc)[2][kChunk]) {
#pragma unroll 1
  for (int i = 0; i < p.directions; ++i) {
    const float B = *global(names.B + i);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float m[kChunk];
      scaled_noise<D>(words_of(chunk + k * half, uint32_t(i), names.step, names.tensor_id, names.keys), m);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        acc[k][j] = std::fma(B, m[j], acc[k][j]);
    }
  }
}

template <Distribution D, bool Far, bool Aligned>
FOGZO_DEVICE void rotated_estimate(const Rotated<Estimate> &p, const Part &part, const EstimateNames &names,
                                   Dtype dtype) {
  const Layout layout = layout_of<false>(part);
  const Scales scales = scales_of<false>(part, p.op.r);
  char *grad = part.address(GRAD, bytes_of(dtype));
  const int chunks = all_chunks(part);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kPairs) {
    const TwoChunks c = two_chunks(p.rotation, turn, chunks);
    const Raw raw[2]{c.some ? load_chunk<Aligned>(grad, c.first, dtype) : Raw{},
                     c.some ? load_chunk<Aligned>(grad, c.second, dtype) : Raw{}};
    const float inv = chunk_scale<false>(scales, c.first).inv; // of both: a block has one
    float x[2][kChunk] = {};
    noise_sum_of_two<D>(p.op, names, chunk_number<false>(layout, c.first), p.rotation.half, x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x[0][i] *= inv;
      x[1][i] *= inv;
    }
    rotate<Far>(x, p.rotation);
    float g[2][kChunk];
    widen(raw[0], dtype, g[0]);
    widen(raw[1], dtype, g[1]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      g[0][i] = std::fma(names.A, g[0][i], x[0][i]);
      g[1][i] = std::fma(names.A, g[1][i], x[1][i]);
    }
    if (c.some) {
      store_chunk<Aligned>(grad, c.first, g[0], dtype);
      store_chunk<Aligned>(grad, c.second, g[1], dtype);
    }
  }
}

template <Distribution D, Dtype G, bool Far>
FOGZO_KERNEL(kThreads, 4)
rotated_estimate_kernel(FOGZO_PARAMETER Rotated<Estimate> p) {
  const Part part = part_of(p.op.tables);
  if (p.op.coefficients[1] == 0.0f) {
    const EstimateNames names = estimate_names<false>(p.op, part);
    const Dtype dtype = actual<G>(p.op.dtype);
    if (part.aligned())
      rotated_estimate<D, Far, true>(p, part, names, dtype);
    else
      rotated_estimate<D, Far, false>(p, part, names, dtype);
  }
  count_bad_alphas<false>(p.op.counters, part);
}

// float32 and bfloat16 are compiled for blocks within a warp; any other pair is told when it runs.
template <Distribution D> RotatedEstimateKernel rotated_estimate_for(Dtype grad, int block) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  if (grad == f32 && !between_warps(block))
    return rotated_estimate_kernel<D, f32, false>;
  if (grad == b16 && !between_warps(block))
    return rotated_estimate_kernel<D, b16, false>;
  return rotated_estimate_kernel<D, any, true>;
}

} // namespace fogzo::cuda
