// Statistics of cells, the elements that share an alpha, and the norm of the guide.
#pragma once

#include "tiles.h"

namespace fogzo::cpu {
namespace {

template <Statistic S> using Lane = std::conditional_t<S == Statistic::absmax, int32_t, double>;

template <Statistic S> void add(Lane<S> &lane, float x) {
  if constexpr (S == Statistic::absmax) {
    const int32_t bits = int32_t(bits_of(x) & 0x7FFFFFFFu); // in the order of abs(x), and NaN above all
    lane = lane > bits ? lane : bits;
  } else if constexpr (S == Statistic::absmean) {
    lane += double(std::fabs(x));
  } else {
    static_assert(S == Statistic::rms || unknown<S>, "add() must know each statistic");
    lane += double(x) * double(x);
  }
}

template <Statistic S, int Half = kSums / 2> double total_of(Lane<S> (&lanes)[kSums]) {
  for (int l = 0; l < Half; ++l) {
    const Lane<S> a = lanes[l], b = lanes[l + Half];
    lanes[l] = S == Statistic::absmax ? (a > b ? a : b) : a + b;
  }
  if constexpr (Half > 1)
    return total_of<S, Half / 2>(lanes);
  else
    return double(lanes[0]);
}

// What n elements come to: number i goes to lane i % kSums, so that the order is the same everywhere.
template <Statistic S> double exact_total(const float *x, int64_t n) {
  Lane<S> lanes[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int l = 0; l < kSums; ++l)
      add<S>(lanes[l], x[i + l]);
  for (int l = 0; i < n; ++i, ++l)
    add<S>(lanes[l], x[i]);
  return total_of<S>(lanes);
}

// The same sum with 8 elements of a lane in float32: for those of 16 bits, whose memory would wait otherwise.
template <Statistic S> double total(const float *x, int64_t n, Dtype dtype) {
  constexpr int64_t step = 8 * kSums;
  if (S == Statistic::absmax || dtype == Dtype::float32 || n < step)
    return exact_total<S>(x, n);
  double lanes[kSums] = {};
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    float sums[kSums] = {};
    for (int k = 0; k < step; k += kSums)
      for (int l = 0; l < kSums; ++l) {
        const float a = x[i + k + l];
        sums[l] += S == Statistic::rms ? a * a : std::fabs(a);
      }
    for (int l = 0; l < kSums; ++l)
      lanes[l] += double(sums[l]);
  }
  const double rest = exact_total<S>(x + i, n - i), found = total_of<Statistic::rms>(lanes) + rest;
  // squares below are off by 2^-149 each; above, sums overflow
  const bool sound = found < INFINITY && (S != Statistic::rms || found >= 0x1p-80);
  return sound ? found : exact_total<S>(x, n);
}

constexpr int64_t kShort = 2 * kSums; // elements of a cell for which so many lanes are too many

// What a short cell comes to.
template <Statistic S> double short_total(const float *x, int64_t n) {
  Lane<S> lane = 0;
  for (int64_t i = 0; i < n; ++i)
    add<S>(lane, x[i]);
  return double(lane);
}

// done(index, total) for each cell of the range: whole cells, or a piece of one. Short cells lie within a tile.
template <Statistic S, class Done>
void for_each_cell(const Operands &item, int64_t begin, int64_t end, Done done) {
  float buffer[kTile];
  const bool is_short = item.scale_length < kShort;
  const int64_t length = least(item.scale_length, end - begin);
  const int64_t step = is_short ? kTile / length * length : kTile;
  int64_t index = 0, left = length;
  double sum = 0;
  for (int64_t start = begin; start < end; start += step) {
    const int64_t count = least(step, end - start);
    const float *x = load(item.latent, start, count, buffer);
    prefetch_tile(item.latent, start + step);
    for (int64_t first = 0; first < count;) {
      const int64_t n = least(count - first, left);
      sum = joined<S>(sum, is_short ? short_total<S>(x + first, n) : total<S>(x + first, n, item.latent.dtype));
      first += n;
      left -= n;
      if (!left) {
        done(index++, sum);
        sum = 0;
        left = length;
      }
    }
  }
}

void measure_range(const Operands &item, const Measure &measure, int64_t begin, int64_t end) {
  float *alpha = static_cast<float *>(item.plus.data) + begin / item.scale_length;
  with_value(measure.statistic, [&](auto statistic) {
    constexpr Statistic S = decltype(statistic)::value;
    for_each_cell<S>(item, begin, end, [&](int64_t cell, double total) {
      alpha[cell] = alpha_of(statistic_of<S>(total, item.scale_length), measure);
    });
  });
}

double total_range(const Operands &item, Statistic statistic, int64_t begin, int64_t end) {
  double sum = 0;
  with_value(statistic, [&](auto S) {
    for_each_cell<decltype(S)::value>(item, begin, end, [&](int64_t, double total) { sum = total; });
  });
  return sum;
}

// Element i of a tile goes to sum i % kSums, so that the order of additions is the same everywhere.
double sumsq_range(const Operands &item, float r, int64_t begin, int64_t end) {
  float buffer[kTile];
  double sums[kSums] = {};
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *g = load(item.grad, start, count, buffer);
    prefetch_tile(item.grad, start + kTile);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      const auto square = [&, delta = double(scale.delta)](int64_t at) {
        const double h = double(g[at]) * delta;
        return h * h;
      };
      int64_t i = first;
      for (; i < last && i % kSums; ++i)
        sums[i % kSums] += square(i);
      for (; i + kSums <= last; i += kSums)
        for (int l = 0; l < kSums; ++l)
          sums[l] += square(i + l);
      for (; i < last; ++i)
        sums[i % kSums] += square(i);
    });
  });
  double total = 0;
  for (double sum : sums)
    total += sum;
  return total;
}

} // namespace
} // namespace fogzo::cpu
