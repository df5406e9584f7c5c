// Learned scales around a transform: H(g h') into PLUS, which may be GRAD, and the gradients of alphas, whose
// terms are those of the rotated weight, into ALPHA_GRAD. Teams are those of learned.cuh, but all threads take
// every turn.
#include "hadamard.cuh"
#include "learned.cuh"

namespace fogzo::cuda {

// A team, a power of two of threads, takes at most `pairs` pairs of chunks of what shares an alpha.
struct Team {
  int threads, number, mate, pairs;
};

FOGZO_DEVICE Team team_for(const Part &part) {
  const int64_t length = part[SCALE_LENGTH];
  const int pairs = int(length < part.span ? length : part.span) / (2 * kChunk);
  int threads = 1;
  while (threads < pairs && threads < kThreads)
    threads *= 2;
  return {threads, thread() / threads, thread() & (threads - 1), pairs};
}

// The terms of a chunk in float32, and g h' in the place of g.
template <StraightThrough Kind>
FOGZO_DEVICE float chunk_terms(const float (&x)[kChunk], float (&g)[kChunk], const Scale &scale,
                               const Grid &grid) {
  float terms = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    terms += learned<Kind>(g[i], x[i], scale, grid);
  return terms;
}

// A thread's part of a sum. Of an alpha that the block does not have nothing is read or written.
template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE double terms_of_thread(const Rotated<Learned> &p, const Part &part, const Cell &cell,
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
      store_chunk<Aligned>(out, c, g[0], t.out);
      store_chunk<Aligned>(out, c + rotation.half, g[1], t.out);
    }
  }
  return sum;
}

template <StraightThrough Kind, bool Far, bool Aligned>
FOGZO_DEVICE void rotated_learned(const Rotated<Learned> &p, const Part &part, const Dtypes &t) {
  const Team team = team_for(part);
  const int64_t length = part[SCALE_LENGTH], last = (part.end() - 1) / length;
#pragma unroll 1
  for (int64_t turn = part.begin / length; turn <= last; turn += kThreads / team.threads) {
    const Cell cell = cell_of(part, turn + team.number);
    const double share = terms_of_thread<Kind, Far, Aligned>(p, part, cell, team, t);
    const double sum = over_team(share, team.threads, Plus());
    if (cell.index <= last && !team.mate)
      write_sum(p.op, part, cell, sum);
  }
}

template <StraightThrough Kind, Dtype T, bool Far>
FOGZO_KERNEL(kThreads, 4)
rotated_learned_kernel(FOGZO_PARAMETER Rotated<Learned> p) {
  const Dtypes &given = p.op.dtypes;
  const Dtypes types{actual<T>(given.latent), actual<T>(given.grad), actual<T>(given.out)};
  const Part part = part_of(p.op.tables);
  if (part.aligned())
    rotated_learned<Kind, Far, true>(p, part, types);
  else
    rotated_learned<Kind, Far, false>(p, part, types);
}

template <StraightThrough Kind> void (*rotated_learned_for(const Dtypes &t, int block))(Rotated<Learned>) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  const auto all = [&](Dtype one) {
    return !between_warps(block) && t.latent == one && t.grad == one && t.out == one;
  };
  return all(f32)   ? rotated_learned_kernel<Kind, f32, false>
         : all(b16) ? rotated_learned_kernel<Kind, b16, false>
                    : rotated_learned_kernel<Kind, any, true>;
}

void rotated_learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                              StraightThrough kind, const AlphaSums &sums, int block) {
  const Learned p{tables_of(plan), grid, dtypes, sums};
  with_value(kind, [&](auto S) {
    launch("rotated_learned_kernel", rotated_learned_for<decltype(S)::value>(dtypes, block), where, plan.blocks,
           kThreads, Rotated<Learned>{p, rotation_of(block)});
  });
  write_long_sums(where, p);
}

} // namespace fogzo::cuda
