// Learned scales around a transform: H(g h') into PLUS, which may be GRAD, and the gradients of alphas, whose
// terms are those of the rotated weight, into ALPHA_GRAD.
//
// As in learned.cu a team of threads takes the elements that share an alpha, which are whole blocks of the
// transform; here all threads take every turn. What several blocks of threads hold is left to a second launch.
#include "hadamard.cuh"
#include "launch.cuh"

#include <cstring>

namespace fogzo::cuda {

struct RotatedLearned {
  Tables tables;
  Grid grid;
  Dtypes dtypes;
  double *partial; // two for each block: what began in an earlier block, and what goes on behind it
};

// Where the elements that share alpha number `index` begin and end, and those of them that the block holds.
struct Shared {
  int64_t index, begin, end, first, last;
};

FOGZO_DEVICE Shared shared_by(const Part &part, int64_t index) {
  const int64_t length = part[SCALE_LENGTH], begin = index * length, end = begin + length, stop = part.end();
  return {index, begin, end, begin < part.begin ? part.begin : begin, end < stop ? end : stop};
}

// A team, a power of two of threads, takes at most `pairs` pairs of chunks of what shares an alpha.
struct Team {
  int threads, number, mate, pairs;
};

FOGZO_DEVICE Team team_for(const Part &part) {
  const int64_t length = part[SCALE_LENGTH];
  const int pairs = int((length < kSpan ? length : kSpan) / (2 * kChunk));
  int threads = 1;
  while (threads < pairs && threads < kThreads)
    threads *= 2;
  return {threads, thread() / threads, thread() & (threads - 1), pairs};
}

// Sum over a team by a tree of a fixed shape, for its first thread.
FOGZO_DEVICE double sum_of_team(double x, const Team &team) {
  FOGZO_SHARED double sums[kThreads];
  barrier(); // all have read what lay there
  sums[thread()] = x;
  for (int half = team.threads / 2; half; half /= 2) {
    barrier();
    if (team.mate < half)
      sums[thread()] += sums[thread() + half];
  }
  return sums[thread()];
}

FOGZO_DEVICE void store_sum(const Part &part, int64_t index, double sum) {
  const int64_t bits = part[FACTOR];
  double factor;
  std::memcpy(&factor, &bits, sizeof factor);
  *global(part.pointer<float>(ALPHA_GRAD) + index) = float(factor * sum);
}

// The terms of a chunk in float32, and g h' in the place of g; as alpha_slope_of() of element.h has them, with
// the hardware's minimum and maximum.
template <StraightThrough Kind>
FOGZO_DEVICE float chunk_terms(const float (&x)[kChunk], float (&g)[kChunk], const Scale &scale,
                               const Grid &grid) {
  float terms = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float z = position(x[i], scale.inv, grid);
    const bool between = (grid.qmin <= z) & (z <= grid.qmax) & (grid.r == 1.0f);
    terms += g[i] * std::fma(grid.r, shifted_code(z, grid) - kRounding, between ? -z : grid.r * grid.offset);
    g[i] *= derivative_of<Kind>(x[i], scale, {grid.qmin, grid.qmax, grid.offset}, grid.r);
  }
  return terms;
}

// A thread's part of a sum. Of an alpha that the block does not have nothing is read or written.
template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE double terms_of_thread(const Rotated<RotatedLearned> &p, const Part &part, const Shared &cell,
                                    const Team &team, const Dtypes &t) {
  const Rotation &rotation = p.rotation;
  const char *latent = part.address(LATENT, bytes_of(t.latent)), *grad = part.address(GRAD, bytes_of(t.grad));
  char *out = part.address(PLUS, bytes_of(t.out));
  const int mine = 2 * team.mate - (team.mate & (rotation.half - 1));
  const int begin = int((cell.first - part.begin) / kChunk), end = int((cell.last - part.begin) / kChunk);
  Scale scale{1.0f, 1.0f};
  if (begin < end)
    scale = scale_of(*global(part.pointer<const float>(ALPHA) + cell.index), p.op.grid.r);
  double sum = 0.0;
#pragma unroll 1
  for (int turn = 0; turn < team.pairs; turn += team.threads) {
    const int c = begin + 2 * turn + mine;
    const bool some = c < end;
    float x[2][kChunk] = {}, g[2][kChunk] = {};
    if (some) {
      load_widened<Aligned>(latent, c, t.latent, x[0]);
      load_widened<Aligned>(latent, c + rotation.half, t.latent, x[1]);
      load_widened<Aligned>(grad, c, t.grad, g[0]);
      load_widened<Aligned>(grad, c + rotation.half, t.grad, g[1]);
    }
    rotate<Far>(x, rotation);
    const float first = chunk_terms<Kind>(x[0], g[0], scale, p.op.grid);
    const float second = chunk_terms<Kind>(x[1], g[1], scale, p.op.grid);
    rotate<Far>(g, rotation);
    if (some) {
      sum += double(first) + double(second);
      store_floats<Aligned>(out, c, g[0], t.out);
      store_floats<Aligned>(out, c + rotation.half, g[1], t.out);
    }
  }
  return sum;
}

template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE void rotated_learned(const Rotated<RotatedLearned> &p, const Part &part, const Dtypes &t) {
  const Team team = team_for(part);
  const int64_t length = part[SCALE_LENGTH], last = (part.end() - 1) / length;
#pragma unroll 1
  for (int64_t turn = part.begin / length; turn <= last; turn += kThreads / team.threads) {
    const Shared cell = shared_by(part, turn + team.number);
    const double sum = sum_of_team(terms_of_thread<Kind, Far, Aligned>(p, part, cell, team, t), team);
    if (cell.index > last || team.mate)
      continue;
    if (cell.begin < cell.first)
      *global(p.op.partial + 2 * block()) = sum;
    else if (cell.end > cell.last)
      *global(p.op.partial + 2 * block() + 1) = sum;
    else
      store_sum(part, cell.index, sum);
  }
}

template <StraightThrough Kind, Dtype T, bool Far>
FOGZO_KERNEL(kThreads, 4)
rotated_learned_kernel(FOGZO_PARAMETER Rotated<RotatedLearned> p) {
  const Dtypes &given = p.op.dtypes;
  const Dtypes types{actual<T>(given.latent), actual<T>(given.grad), actual<T>(given.out)};
  const Part part = part_of(p.op.tables);
  if (part[FAST])
    rotated_learned<Kind, Far, true>(p, part, types);
  else
    rotated_learned<Kind, Far, false>(p, part, types);
}

// The block in which an alpha begins that goes on behind it adds the sums of all that hold it.
FOGZO_KERNEL(kThreads, 8) rotated_learned_sum_kernel(FOGZO_PARAMETER RotatedLearned p) {
  const Part part = part_of(p.tables);
  const Shared cell = shared_by(part, (part.end() - 1) / part[SCALE_LENGTH]);
  if (cell.begin < cell.first || cell.end <= cell.last)
    return;
  const int64_t last = part[FIRST] + (cell.end - 1) / kSpan;
  double sum = thread() ? 0.0 : *global(p.partial + 2 * block() + 1);
#pragma unroll 8
  for (int64_t i = block() + 1 + thread(); i <= last; i += kThreads)
    sum += *global(p.partial + 2 * i);
  sum = sum_of_team(sum, {kThreads, 0, thread(), 0});
  if (thread() == 0)
    store_sum(part, cell.index, sum);
}

template <StraightThrough Kind>
void (*rotated_learned_for(const Dtypes &t, int block))(Rotated<RotatedLearned>) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto all = [&](Dtype one) {
    return !between_warps(block) && t.latent == one && t.grad == one && t.out == one;
  };
  return all(f32)   ? rotated_learned_kernel<Kind, f32, false>
         : all(b16) ? rotated_learned_kernel<Kind, b16, false>
                    : rotated_learned_kernel<Kind, any, true>;
}

void rotated_learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                              StraightThrough kind, double *partial, int block) {
  const RotatedLearned p{tables_of(plan), grid, dtypes, partial};
  with_value(kind, [&](auto S) {
    launch_with_barriers("rotated_learned_kernel", rotated_learned_for<decltype(S)::value>(dtypes, block),
                         where, plan.blocks, kThreads, Rotated<RotatedLearned>{p, rotation_of(block)});
  });
  launch_with_barriers("rotated_learned_sum_kernel", rotated_learned_sum_kernel, where, plan.blocks, kThreads,
                       p);
}

} // namespace fogzo::cuda
