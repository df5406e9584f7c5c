// Learned scales: g h'(theta) into PLUS, which may be GRAD, and the gradients of alphas into ALPHA_GRAD. Around
// a transform both are of the transformed weight, and H(g h') is written.
//
// A team of threads takes the elements that share an alpha. If several blocks hold them, a second launch adds
// what each block has: one sum of the alpha that began in an earlier block, one of the alpha that begins in
// this block and goes on behind it. No atomics, so that the sums have the same bits in every run.
#include "hadamard.cuh"
#include "launch.cuh"
#include "teams.cuh"

#include <cstring>

namespace fogzo::cuda {

struct Learned {
  Plan plan;
  Dtypes dtypes;
  Grid grid;
  AlphaSums sums;
  Rotation rotation;
};

// The elements that share alpha number `index`: all, and the block's, `first` to `last`.
struct Cell {
  int64_t index, begin, end, first, last;

  FOGZO_DEVICE bool some() const { return first < last; }
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

// Writes the block's share of the sum of an alpha's gradient: one thread calls it.
FOGZO_DEVICE void write_sum(const Learned &p, const Part &part, const Cell &cell, double sum) {
  if (cell.begin < cell.first)
    *global(p.sums.partial + 2 * block()) = sum;
  else if (cell.end > cell.last)
    *global(p.sums.partial + 2 * block() + 1) = sum;
  else
    write_alpha_grad(part, cell.index, sum);
}

// Gives alpha_slope_of() of element.h by the hardware's minimum and maximum.
FOGZO_DEVICE float alpha_slope(float z, const Grid &grid) {
  const bool between = (grid.qmin <= z) & (z <= grid.qmax) & (grid.r == 1.0f);
  return std::fma(grid.r, shifted_code(z, grid) - kRounding, between ? -z : grid.r * grid.offset);
}

// Writes g h', and gives the terms of alpha's gradient: a chunk's are added in float32.
template <StraightThrough Kind, class Items>
FOGZO_DEVICE double learned(const Learned &p, const Operands &o, const Scale &scale, const Items &at) {
  constexpr int count = Items::count, size = Items::size;
  const Grid &grid = p.grid;
  Loads<Items> latent, grad;
  float x[count][size], g[count][size], terms[count] = {};
  load_own(at, o.latent, latent);
  load_own(at, o.grad, grad);
  widen(latent, o.latent.dtype, x);
  widen(grad, o.grad.dtype, g);
  at.transform(x);
  unrolled<count>([&](int k) {
    unrolled<size>([&](int i) {
      terms[k] += g[k][i] * alpha_slope(position(x[k][i], scale.inv, grid), grid);
      g[k][i] *= derivative_of<Kind>(x[k][i], scale, {grid.qmin, grid.qmax, grid.offset}, grid.r);
    });
  });
  at.transform(g);
  if (!at.some)
    return 0.0;
  unrolled<count>([&](int k) { at.store(o.out, k, g[k]); });
  return count == 2 ? double(terms[0]) + double(terms[count - 1]) : double(terms[0]);
}

// Gives a thread's share of a cell to `learned`: every `threads`-th chunk, then element, from `mate` on.
template <StraightThrough Kind, bool Aligned>
FOGZO_DEVICE double cell_terms(const Learned &p, const Frame<false> &frame, const Operands &o, const Cell &cell,
                               int mate, int threads) {
  if (!cell.some())
    return 0.0;
  const Part &part = frame.part;
  const Scale scale = scale_of(*global(part.pointer<const float>(ALPHA) + cell.index), p.grid.r);
  double sum = 0.0;
  const int64_t fast = part[FAST], last = cell.last < fast ? cell.last : fast;
  const int chunks = last > cell.first ? int((last - part.begin) / kChunk) : 0;
#pragma unroll 1
  for (int c = int((cell.first - part.begin) / kChunk) + mate; c < chunks; c += threads)
    sum += learned<Kind>(p, o, scale, Chunks<1, Aligned, false>{frame, c, 0});
#pragma unroll 1
  for (int64_t j = (cell.first > fast ? cell.first : fast) + mate; j < cell.last; j += threads)
    sum += learned<Kind>(p, o, scale, Element<false>{frame, j});
  return sum;
}

// The same by two chunks a turn. All threads take every turn of every cell.
template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE double rotated_terms(const Learned &p, const Frame<false> &frame, const Operands &o,
                                  const Cell &cell, int mate, int threads, int pairs) {
  const Part &part = frame.part;
  const int begin = int((cell.first - part.begin) / kChunk), end = int((cell.last - part.begin) / kChunk);
  const float *alpha = part.pointer<const float>(ALPHA) + cell.index;
  const Scale scale = cell.some() ? scale_of(*global(alpha), p.grid.r) : Scale{1.0f, 1.0f};
  double sum = 0.0;
#pragma unroll 1
  for (int turn = 0; turn < pairs; turn += threads) {
    const int c = begin + 2 * turn + first_of_two(p.rotation, mate);
    const TwoChunks<Far, Aligned> at{{frame, c, p.rotation.half}, p.rotation, scale, c < end};
    sum += learned<Kind>(p, o, scale, at);
  }
  return sum;
}

// Sums the terms of each cell of the block, a team of threads for each; `terms` gives a thread's share.
template <class Terms>
FOGZO_DEVICE void over_cells(const Learned &p, const Part &part, int threads, Terms terms) {
  const int team = thread() / threads, mate = thread() & (threads - 1);
  const int64_t length = part[SCALE_LENGTH], last = (part.end() - 1) / length;
#pragma unroll 1
  for (int64_t turn = part.begin / length; turn <= last; turn += kThreads / threads) {
    const Cell cell = cell_of(part, turn + team);
    const double sum = sum_over_team(terms(cell, mate), threads);
    if (cell.some() && !mate)
      write_sum(p, part, cell, sum);
  }
}

// The threads of a team. As many as eight take what shares an alpha, chunks or else elements, so that their
// accesses lie side by side; more only if each has its share of chunks, as all threads of a block have of its
// elements. What a team does once, the scale and the sum, is then little.
FOGZO_DEVICE int team_of(const Part &part) {
  const int share = part.span / kThreads / kChunk;
  const int64_t length = part[SCALE_LENGTH], units = part[FAST] ? (length + kChunk - 1) / kChunk : length;
  int threads = 1;
  while (threads < kThreads && threads < units && (threads < 8 || share * threads < units))
    threads *= 2;
  return threads;
}

// Of dtypes that are known when it runs: one block less on a multiprocessor, or tanh spills 16 bytes on sm_80.
template <StraightThrough Kind, class T>
FOGZO_KERNEL(kThreads, (T::any ? 5 : 6))
learned_kernel(FOGZO_PARAMETER Learned p) {
  const Part part = part_of(p.plan);
  const Frame<false> frame = frame_of<false>(part, p.grid.r);
  const Operands o = operands_of(part, T::of(p.dtypes));
  const int threads = team_of(part);
  if (part.aligned())
    over_cells(p, part, threads, [&](const Cell &cell, int mate) {
      return cell_terms<Kind, true>(p, frame, o, cell, mate, threads);
    });
  else
    over_cells(p, part, threads, [&](const Cell &cell, int mate) {
      return cell_terms<Kind, false>(p, frame, o, cell, mate, threads);
    });
}

template <StraightThrough Kind, class T>
FOGZO_KERNEL(kThreads, 4)
rotated_learned_kernel(FOGZO_PARAMETER Learned p) {
  const Part part = part_of(p.plan);
  const Frame<false> frame = frame_of<false>(part, p.grid.r);
  const Operands o = operands_of(part, T::of(p.dtypes));
  const int64_t length = part[SCALE_LENGTH];
  const int pairs = int(length < part.span ? length : part.span) / (2 * kChunk); // of a cell, at most
  int threads = 1;
  while (threads < pairs && threads < kThreads)
    threads *= 2;
  if (part.aligned())
    over_cells(p, part, threads, [&](const Cell &cell, int mate) {
      return rotated_terms<Kind, T::any, true>(p, frame, o, cell, mate, threads, pairs);
    });
  else
    over_cells(p, part, threads, [&](const Cell &cell, int mate) {
      return rotated_terms<Kind, T::any, false>(p, frame, o, cell, mate, threads, pairs);
    });
}

// Adds the sums of all blocks that hold the alpha which begins in one of them and goes on behind it.
FOGZO_KERNEL(kThreads, 8) learned_sum_kernel(FOGZO_PARAMETER Learned p) {
  const int64_t first = p.sums.crossing[block()];
  const Part part = part_of(p.plan, first);
  const Cell cell = cell_of(part, (part.end() - 1) / part[SCALE_LENGTH]);
  const int64_t last = part[FIRST] + (cell.end - 1) / part.span;
  double sum = thread() ? 0.0 : *global(p.sums.partial + 2 * first + 1);
#pragma unroll 16
  for (int64_t i = first + 1 + thread(); i <= last; i += kThreads)
    sum += *global(p.sums.partial + 2 * i);
  sum = sum_over_team(sum, kThreads);
  if (thread() == 0)
    write_alpha_grad(part, cell.index, sum);
}

void learned_backward(const Call &call, const Grid &grid, StraightThrough kind, Transform transform,
                      const AlphaSums &sums) {
  const Learned p{call.plan, call.dtypes, grid, sums, rotation_of(transform)};
  with_value(kind, [&](auto value) {
    constexpr StraightThrough Kind = decltype(value)::value;
    if (transform.block)
      return launch_for<Float32, Bfloat16, Any>(
          "rotated_learned_kernel", call, dtypes_around(transform, call.dtypes), p,
          [](auto t) { return rotated_learned_kernel<Kind, decltype(t)>; });
    launch_for<Float32, Bfloat16, Any>("learned_kernel", call, call.dtypes, p,
                                       [](auto t) { return learned_kernel<Kind, decltype(t)>; });
  });
  launch("learned_sum_kernel", learned_sum_kernel, call.where, sums.count, p);
}

} // namespace fogzo::cuda
