// Alphas from data: a statistic of each cell, the elements that share an alpha. A team of threads takes a cell.
// Sums go 8 elements in float32 and the rest in float64, by trees of fixed shapes. A second launch joins the
// results of a long cell's pieces. No atomics, so that an alpha has the same bits in every run.
#include "launch.cuh"
#include "teams.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct MeasureCells {
  CellPlan plan;
  Measure measure;
  double *partial;
};

// Gives the total of a chunk. Sums are float32: 0 where squares underflow, infinite where they overflow.
template <Statistic S> FOGZO_DEVICE double chunk_total(const float (&x)[kChunk]) {
  if constexpr (S == Statistic::absmax) {
    uint32_t largest = 0;
    unrolled<kChunk>([&](int i) {
      const uint32_t bits = bits_of(x[i]) & 0x7FFFFFFFu; // in the order of abs(x), and NaN above all
      largest = largest > bits ? largest : bits;
    });
    return double(largest);
  } else {
    static_assert(S == Statistic::absmean || S == Statistic::rms || unknown<S>,
                  "chunk_total() must know each statistic");
    float sum = 0.0f;
    unrolled<kChunk>(
        [&](int i) { sum = S == Statistic::rms ? std::fma(x[i], x[i], sum) : sum + std::fabs(x[i]); });
    return double(sum);
  }
}

// Whether nothing overflowed in a total of chunk_total(), and squares underflowed by at most 2^-149 each in
// 2^-80.
template <Statistic S> FOGZO_DEVICE bool is_sound(double total) {
  return S == Statistic::absmax || (total < INFINITY && (S != Statistic::rms || total >= 0x1p-80));
}

template <Statistic S> FOGZO_DEVICE double element_total(float x) {
  if constexpr (S == Statistic::absmax)
    return double(bits_of(x) & 0x7FFFFFFFu);
  else
    return S == Statistic::rms ? double(x) * double(x) : double(std::fabs(x));
}

template <Statistic S, int Count>
FOGZO_DEVICE double chunks_total(const Operand &data, int c, int step, double total) {
  Raw raw[Count];
  unrolled<Count>([&](int k) { raw[k] = load_chunk<true>(data, int64_t(c + k * step)); });
  unrolled<Count>([&](int k) {
    float x[kChunk];
    widen(raw[k], data.dtype, x);
    total = joined<S>(total, chunk_total<S>(x));
  });
  return total;
}

// Gives the total of a thread's share of `count` elements: every `step`-th chunk, then element, from `lane` on.
template <Statistic S, Dtype T>
FOGZO_DEVICE double share_of(const char *data, int count, bool aligned, int lane, int step) {
  constexpr int at_once = T == Dtype::float32 ? 2 : 4; // chunks: as many bytes
  const Operand x{const_cast<char *>(data), T};
  const int chunks = aligned ? count / kChunk : 0;
  double total = 0.0;
  int c = lane;
#pragma unroll 1
  for (; c + (at_once - 1) * step < chunks; c += at_once * step)
    total = chunks_total<S, at_once>(x, c, step, total);
#pragma unroll 1
  for (; c < chunks; c += step)
    total = chunks_total<S, 1>(x, c, step, total);
  if (!is_sound<S>(total)) { // once more, in float64
    total = 0.0;
#pragma unroll 1
    for (c = lane; c < chunks; c += step)
      for (int j = kChunk * c; j < kChunk * (c + 1); ++j)
        total = joined<S>(total, element_total<S>(load_element(x, j)));
  }
#pragma unroll 1
  for (int j = chunks * kChunk + lane; j < count; j += step)
    total = joined<S>(total, element_total<S>(load_element(x, j)));
  return total;
}

template <Statistic S> FOGZO_DEVICE double join_team(double total, int threads) {
  return over_team(total, threads, [](double a, double b) { return joined<S>(a, b); });
}

FOGZO_DEVICE void write_alpha(const int64_t *row, int64_t cell, float statistic, const Measure &measure) {
  *global(reinterpret_cast<float *>(row[cells::ALPHA]) + cell) = alpha_of(statistic, measure);
}

// Whole cells, or a piece of a long one: its threads are all of the block.
template <Statistic S, class T> FOGZO_KERNEL(kThreads, 8) measure_kernel(FOGZO_PARAMETER MeasureCells p) {
  const int64_t *row = p.plan.table + int64_t(p.plan.owner[block()]) * cells::COLUMNS;
  const int64_t number = block() - row[cells::FIRST], length = row[cells::LENGTH], pieces = row[cells::PIECES];
  const char *data = reinterpret_cast<const char *>(row[cells::DATA]);
  const int width = int(row[cells::THREADS]), lane = thread() & (width - 1), teams = kThreads / width;
  const int64_t piece = number % pieces, start = piece * kSpan;
  const int count = int(length - start < kSpan ? length - start : kSpan);
  const int64_t first = number / pieces * row[cells::PACK], end = first + row[cells::PACK];
  const int64_t last = end < row[cells::CELLS] ? end : row[cells::CELLS];
#pragma unroll 1
  for (int64_t begin = first; begin < last; begin += teams) { // all threads take every turn
    const int64_t cell = begin + thread() / width;
    const char *at = data + (cell * length + start) * bytes_of(T::latent);
    double total = cell < last ? share_of<S, T::latent>(at, count, row[cells::ALIGNED], lane, width) : 0.0;
    total = join_team<S>(total, width);
    if (lane || cell >= last)
      continue;
    if (pieces > 1)
      *global(p.partial + block()) = total;
    else
      write_alpha(row, cell, statistic_of<S>(total, length), p.measure);
  }
}

template <Statistic S> FOGZO_KERNEL(kThreads, 1) join_kernel(FOGZO_PARAMETER MeasureCells p) {
  const int64_t *row = p.plan.table + int64_t(p.plan.second_owner[block()]) * cells::COLUMNS;
  const int64_t cell = block() - row[cells::SECOND], pieces = row[cells::PIECES];
  const double *partial = p.partial + row[cells::FIRST] + cell * pieces;
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = thread(); i < pieces; i += kThreads)
    total = joined<S>(total, *global(partial + i));
  total = join_team<S>(total, kThreads);
  if (thread() == 0)
    write_alpha(row, cell, statistic_of<S>(total, row[cells::LENGTH]), p.measure);
}

void measure_alphas(const Where &where, const CellPlan &plan, const Measure &measure, Address<double> partial) {
  const MeasureCells p{plan, measure, partial};
  with_value(measure.statistic, [&](auto value) {
    constexpr Statistic S = decltype(value)::value;
    const auto kernel = with_dtypes<Float32, Bfloat16, Float16>(
        {plan.data, plan.data, plan.data}, [](auto t) { return measure_kernel<S, decltype(t)>; });
    launch("measure_kernel", kernel, where, plan.blocks, p);
    launch("join_kernel", join_kernel<S>, where, plan.second_blocks, p);
  });
}

} // namespace fogzo::cuda
