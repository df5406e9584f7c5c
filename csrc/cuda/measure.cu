// Alphas from data: a statistic of each cell, the elements that share an alpha. As many threads as a cell has
// use for take it together; sums go 8 elements in float32 and the rest in float64, by trees of fixed shapes.
// What the pieces of a long cell come to is joined in a second launch. No atomics: the same bits in every run.
#include "launch.cuh"
#include "teams.cuh"
#include "tiles.cuh"

namespace fogzo::cuda {

struct MeasureCells {
  const int64_t *table;
  const int32_t *owner;
  Measure measure;
  double *partial;
};

template <Statistic S> struct Joined {
  FOGZO_DEVICE double operator()(double a, double b) const { return joined<S>(a, b); }
};

// What a chunk comes to. Sums are float32: 0 where squares underflow, infinite where they overflow.
template <Statistic S> FOGZO_DEVICE double chunk_total(const float (&x)[kChunk]) {
  if constexpr (S == Statistic::absmax) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t bits = bits_of(x[i]) & 0x7FFFFFFFu; // in the order of abs(x), and NaN above all
      largest = largest > bits ? largest : bits;
    }
    return double(largest);
  } else {
    static_assert(S == Statistic::absmean || S == Statistic::rms || unknown<S>,
                  "chunk_total() must know each statistic");
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      sum = S == Statistic::rms ? std::fma(x[i], x[i], sum) : sum + std::fabs(x[i]);
    return double(sum);
  }
}

// Whether no overflow can be in a total of chunk_total(), and of squares at most 2^-149 for each in 2^-80.
template <Statistic S> FOGZO_DEVICE bool sound(double total) {
  return S == Statistic::absmax || (total < INFINITY && (S != Statistic::rms || total >= 0x1p-80));
}

template <Statistic S> FOGZO_DEVICE double element_total(float x) {
  if constexpr (S == Statistic::absmax)
    return double(bits_of(x) & 0x7FFFFFFFu);
  else
    return S == Statistic::rms ? double(x) * double(x) : double(std::fabs(x));
}

template <Statistic S, Dtype T, int Count>
FOGZO_DEVICE double chunks_total(const char *data, int c, int step, double total) {
  Raw raw[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k)
    raw[k] = load_chunk<true>(data, c + k * step, T);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    float x[kChunk];
    widen(raw[k], T, x);
    total = joined<S>(total, chunk_total<S>(x));
  }
  return total;
}

// What a thread's share of `count` elements comes to, those of every `step`-th chunk or element from `lane` on.
template <Statistic S, Dtype T>
FOGZO_DEVICE double share_of(const char *data, int count, bool aligned, int lane, int step) {
  constexpr int together = T == Dtype::float32 ? 2 : 4; // chunks: as many bytes
  const int chunks = aligned ? count / kChunk : 0;
  double total = 0.0;
  int c = lane;
#pragma unroll 1
  for (; c + (together - 1) * step < chunks; c += together * step)
    total = chunks_total<S, T, together>(data, c, step, total);
#pragma unroll 1
  for (; c < chunks; c += step)
    total = chunks_total<S, T, 1>(data, c, step, total);
  if (!sound<S>(total)) { // once more, in float64
    total = 0.0;
#pragma unroll 1
    for (c = lane; c < chunks; c += step)
      for (int j = kChunk * c; j < kChunk * (c + 1); ++j)
        total = joined<S>(total, element_total<S>(load_element(data, j, T)));
  }
#pragma unroll 1
  for (int j = chunks * kChunk + lane; j < count; j += step)
    total = joined<S>(total, element_total<S>(load_element(data, j, T)));
  return total;
}

FOGZO_DEVICE void write_alpha(const int64_t *row, int64_t cell, float statistic, const Measure &measure) {
  *global(reinterpret_cast<float *>(row[cells::ALPHA]) + cell) = alpha_of(statistic, measure);
}

// Whole cells, or a piece of a long one: its threads are all of the block.
template <Statistic S, Dtype T> FOGZO_KERNEL(kThreads, 8) measure_kernel(FOGZO_PARAMETER MeasureCells p) {
  const int64_t *row = p.table + int64_t(p.owner[block()]) * cells::COLUMNS;
  const int64_t number = block() - row[cells::FIRST], length = row[cells::LENGTH], pieces = row[cells::PIECES];
  const char *data = reinterpret_cast<const char *>(row[cells::DATA]);
  const int width = int(row[cells::THREADS]), lane = thread() & (width - 1), together = kThreads / width;
  const int64_t piece = number % pieces, start = piece * kSpan;
  const int count = int(length - start < kSpan ? length - start : kSpan);
  const int64_t first = number / pieces * row[cells::PACK], end = first + row[cells::PACK];
  const int64_t last = end < row[cells::CELLS] ? end : row[cells::CELLS];
#pragma unroll 1
  for (int64_t begin = first; begin < last; begin += together) { // all threads take every turn
    const int64_t cell = begin + thread() / width;
    const char *at = data + (cell * length + start) * bytes_of(T);
    double total = cell < last ? share_of<S, T>(at, count, row[cells::ALIGNED], lane, width) : 0.0;
    total = over_team(total, width, Joined<S>());
    if (lane || cell >= last)
      continue;
    if (pieces > 1)
      *global(p.partial + block()) = total;
    else
      write_alpha(row, cell, statistic_of<S>(total, length), p.measure);
  }
}

template <Statistic S> FOGZO_KERNEL(kThreads, 1) join_kernel(FOGZO_PARAMETER MeasureCells p) {
  const int64_t *row = p.table + int64_t(p.owner[block()]) * cells::COLUMNS;
  const int64_t cell = block() - row[cells::SECOND], pieces = row[cells::PIECES];
  const double *partial = p.partial + row[cells::FIRST] + cell * pieces;
  double total = 0.0;
#pragma unroll 8
  for (int64_t i = thread(); i < pieces; i += kThreads)
    total = joined<S>(total, *global(partial + i));
  total = over_team(total, kThreads, Joined<S>());
  if (thread() == 0)
    write_alpha(row, cell, statistic_of<S>(total, row[cells::LENGTH]), p.measure);
}

void measure_alphas(const Where &where, const CellPlan &plan, Dtype data, const Measure &measure,
                    double *partial) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, f16 = Dtype::float16;
  with_value(measure.statistic, [&](auto S) {
    constexpr Statistic s = decltype(S)::value;
    void (*kernel)(MeasureCells) = measure_kernel<s, f32>;
    if (data == b16)
      kernel = measure_kernel<s, b16>;
    else if (data == f16)
      kernel = measure_kernel<s, f16>;
    launch("measure_kernel", kernel, where, plan.blocks, kThreads,
           MeasureCells{plan.table, plan.owner, measure, partial});
    launch("join_kernel", join_kernel<s>, where, plan.second_blocks, kThreads,
           MeasureCells{plan.table, plan.second_owner, measure, partial});
  });
}

} // namespace fogzo::cuda
