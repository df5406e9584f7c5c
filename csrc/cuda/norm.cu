// The guide norm: the sum of (delta g)^2, 8 squares in float32 and the rest in float64. Two launches and no
// atomics, so that the sum has the same bits in every run.
#include "launch.cuh"
#include "teams.cuh"

namespace fogzo::cuda {

constexpr int kSumThreads =
    512; // of the block that adds the partial sums; each thread loads 16 of them at once

struct SumSquares {
  Plan plan;
  float r;
  double *partial;
};

// Adds to the sum one item after the other, so that the sum has the same bits for any count.
template <class Items> FOGZO_DEVICE void add_squares(const Operand &grad, const Items &at, double &sum) {
  Loads<Items> loads;
  load(at, grad, loads);
  unrolled<Items::count>([&](int k) {
    const float delta = at.scale(k).delta;
    float g[Items::size], squares = 0.0f;
    widen(loads[k], grad.dtype, g);
    if (Items::size == 1) {
      const double h = g[0] * delta;
      sum += h * h;
    } else {
      unrolled<Items::size>([&](int i) {
        const float h = g[i] * delta;
        squares = std::fma(h, h, squares);
      });
      sum += double(squares);
    }
  });
}

template <class T, bool Plain> FOGZO_KERNEL(kThreads, 8) sumsq_kernel(FOGZO_PARAMETER SumSquares p) {
  const Part part = part_of(p.plan);
  const Operand grad = opaque(part.operand(GRAD, T::grad));
  double sum = 0.0;
  walk<4>(frame_of<Plain>(part, p.r), [&](const auto &at) { add_squares(grad, at, sum); });
  sum = sum_over_team(sum, kThreads);
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
  sum = sum_over_team<kSumThreads>(sum, kSumThreads);
  if (thread())
    return;
  if (p.root)
    *static_cast<float *>(p.out) = float(std::sqrt(sum));
  else
    *static_cast<double *>(p.out) = sum;
}

struct TensorSums {
  const int64_t *table;
  const double *partial;
  double *out;
};

// A block adds the partial sums of one tensor. An empty tensor has none.
FOGZO_KERNEL(kThreads, 8) tensor_sums_kernel(FOGZO_PARAMETER TensorSums p) {
  const int64_t *row = p.table + block() * COLUMNS;
  const int64_t count = (row[NUMEL] + row[SPAN] - 1) / row[SPAN];
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = thread(); i < count; i += kThreads)
    sum += *global(p.partial + row[FIRST] + i);
  sum = sum_over_team(sum, kThreads);
  if (thread() == 0)
    *global(p.out + block()) = sum;
}

void guide_sumsq(const Call &call, float r, Address<double> partial, Address<void> out, bool root,
                 int64_t tensors) {
  const auto kernel = with_dtypes<Float32, Bfloat16, Float16>(call.dtypes, [&](auto t) {
    return call.plan.per_tensor ? sumsq_kernel<decltype(t), true> : sumsq_kernel<decltype(t), false>;
  });
  launch("sumsq_kernel", kernel, call.where, call.plan.blocks, SumSquares{call.plan, r, partial});
  if (tensors)
    return launch("tensor_sums_kernel", tensor_sums_kernel, call.where, tensors,
                  TensorSums{call.plan.table, partial, static_cast<double *>(out.at)});
  launch("sum_kernel", sum_kernel, call.where, 1, Sum{partial, call.plan.blocks, out, root}, kSumThreads);
}

} // namespace fogzo::cuda
