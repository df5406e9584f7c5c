// Learned scales: g h'(theta) into PLUS, which may be GRAD, and the gradients of alphas into ALPHA_GRAD.
#include "learned.cuh"

namespace fogzo::cuda {

// The threads for what shares an alpha, by chunks where there are any: as many as eight take it together, so
// that their accesses lie side by side, and more only where each has its share of chunks, as all threads of a
// block do of its elements. What a team does once, the scale and the sum, is then little.
FOGZO_DEVICE int team_of(const Part &part) {
  const int share = part.span / kThreads / kChunk;
  const int64_t length = part[SCALE_LENGTH], units = part[FAST] ? (length + kChunk - 1) / kChunk : length;
  int threads = 1;
  while (threads < kThreads && threads < units && (threads < 8 || share * threads < units))
    threads *= 2;
  return threads;
}

// A thread's share of a cell: every `threads`-th chunk, then element, from `mate` on.
template <StraightThrough Kind, bool Aligned>
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
    const Raw raw = load_chunk<Aligned>(latent, c, t.latent), raw_g = load_chunk<Aligned>(grad, c, t.grad);
    widen(raw, t.latent, theta);
    widen(raw_g, t.grad, g);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      terms += learned<Kind>(g[i], theta[i], scale, p.grid);
    sum += double(terms);
    store_chunk<Aligned>(out, c, g, t.out);
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

template <StraightThrough Kind, bool Aligned>
FOGZO_DEVICE void learned_part(const Learned &p, const Part &part, const Dtypes &types) {
  const int threads = team_of(part), team = thread() / threads, mate = thread() & (threads - 1);
  const int64_t length = part[SCALE_LENGTH], last = (part.end() - 1) / length;
#pragma unroll 1
  for (int64_t turn = part.begin / length; turn <= last; turn += kThreads / threads) {
    const Cell cell = cell_of(part, turn + team);
    const bool some = cell.index <= last;
    const double share = some ? cell_terms<Kind, Aligned>(p, part, cell, types, mate, threads) : 0.0;
    const double sum = over_team(share, threads, Plus());
    if (some && !mate)
      write_sum(p, part, cell, sum);
  }
}

// Of dtypes that are told when it runs, one block less on a multiprocessor, or tanh spills 16 bytes on sm_80.
template <StraightThrough Kind, Dtype T>
FOGZO_KERNEL(kThreads, (T == Dtype::any ? 5 : 6))
learned_kernel(FOGZO_PARAMETER Learned p) {
  const Dtypes types{actual<T>(p.dtypes.latent), actual<T>(p.dtypes.grad), actual<T>(p.dtypes.out)};
  const Part part = part_of(p.tables);
  if (part.aligned())
    learned_part<Kind, true>(p, part, types);
  else
    learned_part<Kind, false>(p, part, types);
}

// Adds the sums of all blocks that hold the alpha which begins in one of them and goes on behind it.
FOGZO_KERNEL(kThreads, 8) learned_sum_kernel(FOGZO_PARAMETER Learned p) {
  const int64_t here = p.sums.crossing[block()];
  const Part part = part_of(p.tables, here);
  const Cell cell = cell_of(part, (part.end() - 1) / part[SCALE_LENGTH]);
  const int64_t last = part[FIRST] + (cell.end - 1) / part.span;
  double sum = thread() ? 0.0 : *global(p.sums.partial + 2 * here + 1);
#pragma unroll 16
  for (int64_t i = here + 1 + thread(); i <= last; i += kThreads)
    sum += *global(p.sums.partial + 2 * i);
  sum = over_team(sum, kThreads, Plus());
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

void write_long_sums(const Where &where, const Learned &p) {
  launch("learned_sum_kernel", learned_sum_kernel, where, p.sums.count, kThreads, p);
}

void learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                      StraightThrough kind, const AlphaSums &sums) {
  const Learned p{tables_of(plan), grid, dtypes, sums};
  with_value(kind, [&](auto S) {
    launch("learned_kernel", learned_for<decltype(S)::value>(dtypes), where, plan.blocks, kThreads, p);
  });
  write_long_sums(where, p);
}

} // namespace fogzo::cuda
