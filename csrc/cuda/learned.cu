// Learned scales: g h'(theta) into PLUS, which may be GRAD, and the gradients of alphas into ALPHA_GRAD.
//
// A team of threads takes the elements that share an alpha. An alpha whose elements several blocks hold is left
// to a second launch, as two sums a block: that of the alpha which began in an earlier block, and that of the
// one which begins in this block and goes on behind it. No atomics, so that the sums have the same bits in
// every run.
#include "launch.cuh"
#include "tiles.cuh"

#include <cstring>

namespace fogzo::cuda {

struct Learned {
  Tables tables;
  Grid grid;
  Dtypes dtypes;
  double *partial; // two for each block
};

// The elements that share alpha number `index`, and those of them that the block holds.
struct Cell {
  int64_t index, begin, end, first, last;

  FOGZO_DEVICE bool began_before() const { return begin < first; }
  FOGZO_DEVICE bool goes_on() const { return end > last; }
};

FOGZO_DEVICE Cell cell_of(const Part &part, int64_t index) {
  const int64_t length = part[SCALE_LENGTH], begin = index * length, end = begin + length, stop = part.end();
  return {index, begin, end, begin < part.begin ? part.begin : begin, end < stop ? end : stop};
}

FOGZO_DEVICE void write_alpha_grad(const Part &part, int64_t index, double sum) {
  const int64_t bits = part[FACTOR];
  double factor;
  std::memcpy(&factor, &bits, sizeof factor);
  *global(part.pointer<float>(ALPHA_GRAD) + index) = float(factor * sum);
}

// Sum over a team of threads, a power of two of neighbours, by a tree of a fixed shape; for the first of them.
// Every thread of the block must come here.
FOGZO_DEVICE double team_sum(double x, int threads) {
  FOGZO_SHARED double sums[kThreads];
  if (threads == 1)
    return x;
  const int mate = thread() & (threads - 1);
  sums[thread()] = x;
  for (int half = threads / 2; half; half /= 2) {
    barrier();
    if (mate < half)
      sums[thread()] += sums[thread() + half];
  }
  x = sums[thread()];
  barrier(); // before the next sum
  return x;
}

// A power of two for what shares an alpha, by chunks where there are any: as many as eight threads take
// together, so that their accesses lie side by side, and more so that each has kShare of them: a sum over the
// team costs as much.
constexpr int kShare = 4;

FOGZO_DEVICE int team_of(const Part &part) {
  const int64_t length = part[SCALE_LENGTH], units = part[FAST] ? (length + kChunk - 1) / kChunk : length;
  int threads = 1;
  while (threads < kThreads && threads < units && (threads < 8 || kShare * threads < units))
    threads *= 2;
  return threads;
}

// alpha_slope_of() of element.h, with the hardware's minimum and maximum
FOGZO_DEVICE float alpha_slope(float z, const Grid &grid) {
  const bool between = (grid.qmin <= z) & (z <= grid.qmax) & (grid.r == 1.0f);
  return std::fma(grid.r, shifted_code(z, grid) - kRounding, between ? -z : grid.r * grid.offset);
}

// g h' in the place of g; returns the term of alpha's gradient.
template <StraightThrough Kind>
FOGZO_DEVICE float learned(float &g, float theta, const Scale &scale, const Grid &grid) {
  const float term = g * alpha_slope(position(theta, scale.inv, grid), grid);
  g *= derivative_of<Kind>(theta, scale, {grid.qmin, grid.qmax, grid.offset}, grid.r);
  return term;
}

// A thread's share of a cell: every `threads`-th chunk, then element, from `mate` on.
template <StraightThrough Kind>
FOGZO_DEVICE double cell_terms(const Learned &p, const Part &part, const Cell &cell, const Dtypes &t, int mate,
                               int threads) {
  const char *latent = part.address(LATENT, bytes_of(t.latent)), *grad = part.address(GRAD, bytes_of(t.grad));
  char *out = part.address(PLUS, bytes_of(t.out));
  const Scale scale = scale_of(*global(part.pointer<const float>(ALPHA) + cell.index), p.grid.r);
  double sum = 0.0;
  const int64_t fast = part[FAST], last = cell.last < fast ? cell.last : fast;
  const int chunks = last > cell.first ? int((last - part.begin) / kChunk) : 0;
#pragma unroll 1
  for (int c = int((cell.first - part.begin) / kChunk) + mate; c < chunks; c += threads) {
    float theta[kChunk], g[kChunk], terms = 0.0f;
    const Raw raw = load_chunk(latent, c, t.latent), raw_g = load_chunk(grad, c, t.grad);
    widen(raw, t.latent, theta);
    widen(raw_g, t.grad, g);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      terms += learned<Kind>(g[i], theta[i], scale, p.grid);
    sum += double(terms);
    store_chunk(out, c, g, t.out);
  }
#pragma unroll 1
  for (int64_t j = (cell.first > fast ? cell.first : fast) + mate; j < cell.last; j += threads) {
    const float theta = load_element(part.pointer<void>(LATENT), j, t.latent);
    float g = load_element(part.pointer<void>(GRAD), j, t.grad);
    sum += double(learned<Kind>(g, theta, scale, p.grid));
    store_element(part.pointer<void>(PLUS), j, g, t.out);
  }
  return sum;
}

template <StraightThrough Kind, Dtype T> FOGZO_KERNEL(kThreads, 6) learned_kernel(FOGZO_PARAMETER Learned p) {
  const Dtypes types{actual<T>(p.dtypes.latent), actual<T>(p.dtypes.grad), actual<T>(p.dtypes.out)};
  const Part part = part_of(p.tables);
  const int threads = team_of(part), team = thread() / threads, mate = thread() & (threads - 1);
  const int64_t length = part[SCALE_LENGTH], last = (part.end() - 1) / length;
#pragma unroll 1
  for (int64_t turn = part.begin / length; turn <= last; turn += kThreads / threads) {
    const Cell cell = cell_of(part, turn + team);
    const bool some = cell.index <= last;
    const double sum = team_sum(some ? cell_terms<Kind>(p, part, cell, types, mate, threads) : 0.0, threads);
    if (!some || mate)
      continue;
    if (cell.began_before())
      *global(p.partial + 2 * block()) = sum;
    else if (cell.goes_on())
      *global(p.partial + 2 * block() + 1) = sum;
    else
      write_alpha_grad(part, cell.index, sum);
  }
}

struct LearnedSum {
  Tables tables;
  const double *partial;
};

// The block in which an alpha begins that goes on behind it adds the sums of all that hold it.
FOGZO_KERNEL(kThreads, 8) learned_sum_kernel(FOGZO_PARAMETER LearnedSum p) {
  const Part part = part_of(p.tables);
  const Cell cell = cell_of(part, (part.end() - 1) / part[SCALE_LENGTH]);
  if (cell.began_before() || !cell.goes_on())
    return;
  const int64_t last = part[FIRST] + (cell.end - 1) / kSpan;
  double sum = thread() ? 0.0 : *global(p.partial + 2 * block() + 1);
#pragma unroll 8
  for (int64_t i = block() + 1 + thread(); i <= last; i += kThreads)
    sum += *global(p.partial + 2 * i);
  sum = team_sum(sum, kThreads);
  if (thread() == 0)
    write_alpha_grad(part, cell.index, sum);
}

template <StraightThrough Kind> void (*learned_for(const Dtypes &t))(Learned) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto all = [&](Dtype one) { return t.latent == one && t.grad == one && t.out == one; };
  return all(f32)   ? learned_kernel<Kind, f32>
         : all(b16) ? learned_kernel<Kind, b16>
                    : learned_kernel<Kind, any>;
}

void learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                      StraightThrough kind, double *partial) {
  with_value(kind, [&](auto S) {
    launch_with_barriers("learned_kernel", learned_for<decltype(S)::value>(dtypes), where, plan.blocks,
                         kThreads, Learned{tables_of(plan), grid, dtypes, partial});
  });
  launch_with_barriers("learned_sum_kernel", learned_sum_kernel, where, plan.blocks, kThreads,
                       LearnedSum{tables_of(plan), partial});
}

} // namespace fogzo::cuda
