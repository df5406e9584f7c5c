// Alphas from data: a statistic of each cell, the elements that share an alpha. As many threads as a cell has
// use for take it together; sums go 8 elements in float32 and the rest in float64, by trees of fixed shapes.
// What the pieces of a long cell come to is joined in a second launch. No atomics: the same bits in every run.
#include "launch.cuh"
#include "tiles.cuh"

#include <cfloat>

namespace fogzo::cuda {

struct MeasureCells {
  const int64_t *table;
  const int32_t *owner;
  Measure measure;
  double *partial;
};

// What a chunk comes to.
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
    constexpr bool squares = S == Statistic::rms;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      sum = squares ? std::fma(x[i], x[i], sum) : sum + std::fabs(x[i]);
    if (sum <= FLT_MAX && (!squares || sum >= 0x1p-80f))
      return double(sum);
    double total = 0.0; // where float32 overflows, or squares lose bits to underflow
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      total += squares ? double(x[i]) * double(x[i]) : double(std::fabs(x[i]));
    return total;
  }
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
    raw[k] = load_chunk(data, c + k * step, T);
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
  const int chunks = aligned ? count / kChunk : 0;
  double total = 0.0;
  int c = lane;
  if constexpr (T != Dtype::float32) // whose chunks are twice as long
#pragma unroll 1
    for (; c + 3 * step < chunks; c += 4 * step)
      total = chunks_total<S, T, 4>(data, c, step, total);
#pragma unroll 1
  for (; c + step < chunks; c += 2 * step)
    total = chunks_total<S, T, 2>(data, c, step, total);
  if (c < chunks)
    total = chunks_total<S, T, 1>(data, c, step, total);
#pragma unroll 4
  for (int j = chunks * kChunk + lane; j < count; j += step)
    total = joined<S>(total, element_total<S>(load_element(data, j, T)));
  return total;
}

// Of `width` threads in a row, a power of two, by a tree; for the first of them.
template <Statistic S> FOGZO_DEVICE double joined_over(double total, int width) {
  FOGZO_SHARED double totals[kThreads];
  barrier(); // until nobody reads what the call before this one left
  totals[thread()] = total;
  for (int half = width / 2; half; half /= 2) {
    barrier();
    if ((thread() & (width - 1)) < half)
      totals[thread()] = joined<S>(totals[thread()], totals[thread() + half]);
  }
  return totals[thread()];
}

FOGZO_DEVICE void write_alpha(const int64_t *row, int64_t cell, float statistic, const Measure &measure) {
  *global(reinterpret_cast<float *>(row[cells::ALPHA]) + cell) = alpha_of(statistic, measure);
}

template <Statistic S, Dtype T> FOGZO_KERNEL(kThreads, 8) measure_kernel(FOGZO_PARAMETER MeasureCells p) {
  const int64_t *row = p.table + int64_t(p.owner[block()]) * cells::COLUMNS;
  const int64_t number = block() - row[cells::FIRST], length = row[cells::LENGTH];
  const char *data = reinterpret_cast<const char *>(row[cells::DATA]);
  const bool aligned = row[cells::ALIGNED];
  if (const int64_t pieces = row[cells::PIECES]; pieces > 1) {
    const int64_t cell = number / pieces, begin = (number - cell * pieces) * kSpan, left = length - begin;
    const char *at = data + (cell * length + begin) * bytes_of(T);
    const double total = joined_over<S>(
        share_of<S, T>(at, int(left < kSpan ? left : kSpan), aligned, thread(), kThreads), kThreads);
    if (thread() == 0)
      *global(p.partial + block()) = total;
    return;
  }
  const int width = int(row[cells::THREADS]), lane = thread() & (width - 1), together = kThreads / width;
  const int64_t first = number * row[cells::PACK], end = first + row[cells::PACK];
  const int64_t last = end < row[cells::CELLS] ? end : row[cells::CELLS];
#pragma unroll 1
  for (int64_t begin = first; begin < last; begin += together) { // all threads take every turn
    const int64_t cell = begin + thread() / width;
    const char *at = data + cell * length * bytes_of(T);
    double total = cell < last ? share_of<S, T>(at, int(length), aligned, lane, width) : 0.0;
    if (width > 1)
      total = joined_over<S>(total, width);
    if (lane == 0 && cell < last)
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
  total = joined_over<S>(total, kThreads);
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
    launch_with_barriers("measure_kernel", kernel, where, plan.blocks, kThreads,
                         MeasureCells{plan.table, plan.owner, measure, partial});
    launch_with_barriers("join_kernel", join_kernel<s>, where, plan.second_blocks, kThreads,
                         MeasureCells{plan.table, plan.second_owner, measure, partial});
  });
}

} // namespace fogzo::cuda
