// Gradients through Q (docs/contract.md, section 4): g h'(theta), and those of learned alphas.
#pragma once

#include "hadamard.h"
#include "runs.h"

namespace fogzo::cpu {
namespace {

template <StraightThrough S>
void straight_through_loops(const Operands &item, GridRange grid, float r, int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load_rotated(item, start, count, latent), *g = load(item.grad, start, count, grad);
    float *to = target(item.plus, start, out);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = g[i] * derivative_of<S>(t[i], scale, grid, r);
    });
    if (item.block)
      rotate(to, to, count, item.block);
    store(to, item.plus, start, count);
  });
}

void straight_through_range(const Operands &item, StraightThrough kind, GridRange grid, float r, int64_t begin,
                            int64_t end) {
  with_value(kind, [&](auto S) { straight_through_loops<decltype(S)::value>(item, grid, r, begin, end); });
}

// Sum of a few thousand floats. Element i goes to sum i % kSums, so that the order is the same everywhere, and
// those that do not fill the sums come last. Some may be in `sums` already, as `begun` tells.
double sum_of(double (&sums)[kSums], bool begun, const float *terms, int64_t count) {
  double total = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int l = 0; l < kSums; ++l)
      sums[l] += double(terms[i + l]);
  if (i || begun)
    for (double sum : sums)
      total += sum;
  for (; i < count; ++i)
    total += double(terms[i]);
  return total;
}

// Kernels of a part of a tile that shares an alpha: each writes g h' to plus, and returns the sum of terms of
// the alpha's gradient.

// By the compiler's vectors, of float32. Two loops: both in one are no vectors on every instruction set.
template <StraightThrough S> struct LearnedLoops {
  static double part(const Operands &item, const GridRange &range, float r, int64_t begin, int64_t end,
                     Scale scale) {
    const int64_t count = end - begin;
    const float *const t = load(item.latent, begin, count, nullptr), *const g =
                                                                         load(item.grad, begin, count, nullptr);
    float terms[kTile], *const to = target(item.plus, begin, nullptr);
    const GridRange grid = range;
    FOGZO_LOOP(int64_t i = 0; i < count; ++i)
    terms[i] = g[i] * alpha_slope_of(position_of(t[i], scale, grid), grid, r);
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = g[i] * derivative_of<S>(t[i], scale, grid, r);
    double sums[kSums] = {};
    return sum_of(sums, false, terms, count);
  }
};

#if FOGZO_ISA
// Sums of terms as sum_of() has them: element i goes to number i % kSums.
template <bool PAIRS> struct VectorSums {
  static constexpr int kCount = 2 * kSums / kWidth; // vectors of doubles
  D lanes[kCount] = {};

  // the halves of two vectors, one after the other
  void add(F first, F last) {
    constexpr int step[] = {0, 1 * kCount / 4, 2 * kCount / 4, 3 * kCount / 4};
    lanes[PAIRS ? step[0] : 0] += low_doubles(first);
    lanes[PAIRS ? step[1] : 1] += high_doubles(first);
    lanes[PAIRS ? step[2] : 2 % kCount] += low_doubles(last);
    lanes[PAIRS ? step[3] : 3 % kCount] += high_doubles(last);
  }
  void store(double (&sums)[kSums]) const {
    double in_order[kSums];
    std::memcpy(in_order, lanes, sizeof in_order);
    for (int i = 0; i < kSums; ++i) // in pairs the even ones come first
      sums[i] = in_order[PAIRS ? i % 2 * (kSums / 2) + i / 2 : i];
  }
};

// 2 kWidth elements at a time, of the straight-through forms that are 1 or 0.
template <StraightThrough S, Dtype T> struct LearnedVectors {
  static constexpr bool PAIRS = in_pairs<T>(T);
  static constexpr int kStep = 2 * kWidth;

  static double part(const Operands &item, const GridRange &range, float r, int64_t begin, int64_t end,
                     Scale scale) {
    const GridOf<F> grid{broadcast(range.qmin), broadcast(range.qmax), broadcast(range.offset)};
    const ScaleOf<F> scales{broadcast(scale.delta), broadcast(scale.inv)};
    VectorSums<PAIRS> vector_sums;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      const Two t = load_two<T, PAIRS>(item.latent.data, i), g = load_two<T, PAIRS>(item.grad.data, i);
      const F z0 = position_of(t.first, scales, grid), z1 = position_of(t.last, scales, grid);
      vector_sums.add(g.first * alpha_slope_of(z0, grid, r), g.last * alpha_slope_of(z1, grid, r));
      store_two<T, PAIRS, Narrow::exact>(item.plus.data, i, g.first * indicator_of<S>(z0, grid),
                                         g.last * indicator_of<S>(z1, grid)); // g, 0 or NaN
    }
    double sums[kSums];
    vector_sums.store(sums);
    // the rest
    const int64_t count = end - i;
    float latent[kStep], grad[kStep], terms[kStep], out[kStep];
    const float *t = load(item.latent, i, count, latent), *g = load(item.grad, i, count, grad);
    for (int64_t j = 0; j < count; ++j) {
      terms[j] = g[j] * alpha_slope_of(position_of(t[j], scale, range), range, r);
      out[j] = g[j] * derivative_of<S>(t[j], scale, range, r);
    }
    store(out, item.plus, i, count);
    return sum_of(sums, i > begin, terms, count);
  }
};
#endif

// buffered: the kernel takes float32 copies of operands that are rotated or of another dtype
template <class Kernel>
Cut learned_by(const Operands &item, const GridRange &grid, float r, bool buffered, int64_t begin,
               int64_t end) {
  float latent[kTile], grad[kTile], out[kTile];
  Cut cut;
  double sum = 0; // of the alpha at hand, so far
  const int64_t length = item.scale_length;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    Operands tile = item;
    float *const to = target(item.plus, start, out);
    if (buffered) {
      tile.latent = tile_span(load_rotated(item, start, count, latent), start);
      tile.grad = tile_span(load(item.grad, start, count, grad), start);
      tile.plus = tile_span(to, start);
    }
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      sum += Kernel::part(tile, grid, r, start + first, start + last, scale);
      const int64_t index = (start + first) / length, from = index * length;
      if (start + last < from + length) // it goes on
        return;
      if (from < begin)
        cut.before = sum;
      else
        item.alpha_grad[index] = float(item.factor * sum);
      sum = 0;
    });
    if (item.block)
      rotate(to, to, count, item.block);
    if (buffered)
      store(to, item.plus, start, count);
  });
  if (end % length) // the last one goes on
    (end / length * length < begin ? cut.before : cut.behind) = sum;
  return cut;
}

Cut learned_range(const Operands &item, StraightThrough kind, GridRange grid, float r, int64_t begin,
                  int64_t end) {
  const auto all = [&](Dtype dtype) {
    return !item.block && item.latent.dtype == dtype && item.grad.dtype == dtype && item.plus.dtype == dtype;
  };
  return with_value(kind, [&](auto form) {
    constexpr StraightThrough S = decltype(form)::value;
#if FOGZO_ISA
    if constexpr (has_indicator<S>) {
      if (all(Dtype::bfloat16))
        return learned_by<LearnedVectors<S, Dtype::bfloat16>>(item, grid, r, false, begin, end);
      return learned_by<LearnedVectors<S, Dtype::float32>>(item, grid, r, !all(Dtype::float32), begin, end);
    }
#endif
    return learned_by<LearnedLoops<S>>(item, grid, r, !all(Dtype::float32), begin, end);
  });
}

} // namespace
} // namespace fogzo::cpu
