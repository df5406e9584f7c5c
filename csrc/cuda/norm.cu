// The guide norm: sum of (delta g)^2, 8 squares in float32 and the rest in float64. Two launches and no
// atomics, so that the sum has the same bits in every run.
#include "launch.cuh"
#include "teams.cuh"

namespace fogzo::cuda {

constexpr int kSumThreads = 512; // of the block that adds the partial sums, 16 of them on their way to each

struct SumSquares {
  Tables tables;
  float r;
  double *partial;
};

FOGZO_DEVICE double chunk_squares(const Raw &raw, Dtype dtype, float delta) {
  float g[kChunk], sum = 0.0f;
  widen(raw, dtype, g);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float h = g[i] * delta;
    sum = std::fma(h, h, sum);
  }
  return double(sum);
}

// One after the other, so that the sum has the same bits for any Count.
template <int Count, bool Plain>
FOGZO_DEVICE double squares(const char *grad, const Scales &scales, int c, Dtype dtype, double sum) {
  Raw g[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k)
    g[k] = load_chunk<(Count > 1)>(grad, c + k * kThreads, dtype);
#pragma unroll
  for (int k = 0; k < Count; ++k)
    sum += chunk_squares(g[k], dtype, chunk_scale<Plain>(scales, c + k * kThreads).delta);
  return sum;
}

template <Dtype G, bool Plain> FOGZO_KERNEL(kThreads, 8) sumsq_kernel(FOGZO_PARAMETER SumSquares p) {
  const Part part = part_of(p.tables);
  const char *grad = part.address(GRAD, bytes_of(G));
  const Scales scales = scales_of<Plain>(part, p.r);
  const int chunks = part.chunks(), wide = part.aligned() ? chunks : 0;
  double sum = 0.0;
  int c = thread();
#pragma unroll 1
  for (; c + 3 * kThreads < wide; c += 4 * kThreads)
    sum = squares<4, Plain>(grad, scales, c, G, sum);
#pragma unroll 1
  for (; c < chunks; c += kThreads)
    sum = squares<1, Plain>(grad, scales, c, G, sum);
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads) {
    const double h = load_element(part.pointer<void>(GRAD), j, G) * element_scale(part, j, p.r).delta;
    sum += h * h;
  }
  sum = over_team(sum, kThreads, Plus());
  if (thread() == 0)
    *global(p.partial + block()) = sum;
}

struct Sum {
  const double *partial;
  int64_t count;
  void *out;
  bool root; // the norm, float32, instead of the sum, float64
};

FOGZO_KERNEL(kSumThreads, 1) sum_kernel(FOGZO_PARAMETER Sum p) {
  double sum = 0.0;
#pragma unroll 16
  for (int64_t i = thread(); i < p.count; i += kSumThreads)
    sum += *global(p.partial + i);
  sum = over_team<kSumThreads>(sum, kSumThreads, Plus());
  if (thread())
    return;
  if (p.root)
    *static_cast<float *>(p.out) = float(std::sqrt(sum));
  else
    *static_cast<double *>(p.out) = sum;
}

void guide_sumsq(const Where &where, const Plan &plan, Dtype grad, float r, double *partial, void *out,
                 bool root) {
  const SumSquares p{tables_of(plan), r, partial};
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, f16 = Dtype::float16;
  void (*kernel)(SumSquares) = plan.per_tensor ? sumsq_kernel<f32, true> : sumsq_kernel<f32, false>;
  if (grad == b16)
    kernel = plan.per_tensor ? sumsq_kernel<b16, true> : sumsq_kernel<b16, false>;
  else if (grad == f16)
    kernel = plan.per_tensor ? sumsq_kernel<f16, true> : sumsq_kernel<f16, false>;
  launch("sumsq_kernel", kernel, where, plan.blocks, kThreads, p);
  launch("sum_kernel", sum_kernel, where, 1, kSumThreads, Sum{partial, plan.blocks, out, root});
}

} // namespace fogzo::cuda
