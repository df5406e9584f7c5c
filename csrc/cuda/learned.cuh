// What the backward passes of learned scales share. A team of threads takes the elements that share an alpha.
// An alpha whose elements several blocks hold is left to a second launch, as two sums a block: that of the
// alpha which began in an earlier block, and that of the one which begins in this block and goes on behind it.
// No atomics, so that the sums have the same bits in every run.
#pragma once

#include "launch.cuh"
#include "teams.cuh"

#include <cstring>

namespace fogzo::cuda {

struct Learned {
  Tables tables;
  Grid grid;
  Dtypes dtypes;
  AlphaSums sums;
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

// What the block has of the sum of an alpha's gradient: one thread writes it.
FOGZO_DEVICE void write_sum(const Learned &p, const Part &part, const Cell &cell, double sum) {
  if (cell.began_before())
    *global(p.sums.partial + 2 * block()) = sum;
  else if (cell.goes_on())
    *global(p.sums.partial + 2 * block() + 1) = sum;
  else
    write_alpha_grad(part, cell.index, sum);
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

// The second launch.
void write_long_sums(const Where &where, const Learned &p);

} // namespace fogzo::cuda
