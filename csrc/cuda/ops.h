// The CUDA ops' interface: an op takes addresses, counts and scalars, and makes one or two launches. It needs
// no torch, so that one build serves every release, and no CUDA header, so that callers compile without nvcc.
#pragma once

#include "../element.h"

#include <cstdint>

namespace fogzo::cuda {

enum class Dtype { FOGZO_DTYPES(FOGZO_ENUMERATOR) any }; // any: known when it runs

// Columns of a plan's table (fogzo_kernels/backends/gpu/plans.py), in order.
#define FOGZO_COLUMNS                                                                                          \
  LATENT, GRAD, PLUS, MINUS, ALPHA, TENSOR_ID, NUMEL, FAST, ALIGNED, FIRST, OFFSET, INNER, SKIP, SPAN,         \
      SCALE_LENGTH, INNER_DIVISOR, SCALE_DIVISOR, STATE_1, STATE_2, ALPHA_GRAD, FACTOR

enum Column { FOGZO_COLUMNS, COLUMNS };

// Columns of the table of a reduction over cells (fogzo_kernels/backends/gpu/cells.py), in order.
#define FOGZO_CELL_COLUMNS DATA, ALPHA, LENGTH, CELLS, ALIGNED, FIRST, PACK, PIECES, SECOND, THREADS, WIDTH

namespace cells {
enum Column { FOGZO_CELL_COLUMNS, COLUMNS };
} // namespace cells

constexpr int kSpan = 16384;  // elements of a thread block in a reduction over cells, and at most elsewhere
constexpr int kThreads = 128; // of a thread block
constexpr int kWarp = 32;     // threads that run in step
constexpr int kChunk = 8;     // elements of a Philox call

struct Where {
  int device;
  uintptr_t stream;
};

// A table of tensors on the device, and for each thread block the row that it works on.
struct Plan {
  const int64_t *table;
  const int32_t *owner;
  int64_t blocks;
  bool per_tensor, shard;
};

// The same for a reduction over cells. The second launch joins the results of a long cell's pieces.
struct CellPlan {
  const int64_t *table;
  const int32_t *owner, *second_owner;
  int64_t blocks, second_blocks;
  Dtype data;
};

struct Dtypes {
  Dtype latent, grad, out;
};

// What almost every op is told: where it runs, on which tensors, and their dtypes.
struct Call {
  Where where;
  Plan plan;
  Dtypes dtypes;
};

// An address on the device; Python gives a number, 0 for none.
template <class T> struct Address {
  T *at;
  operator T *() const { return at; }
};

// A scalar on the host, or in device memory where `at` is not null.
template <class T> struct Scalar {
  const T *at;
  T value;
};

// The noise of a step, as a function of the element; `C` makes its variance 1.
struct Draw {
  Distribution distribution;
  double C;
  Scalar<int64_t> seed, step;
  uint32_t direction;
};

// How noise and guide make v, and how far the probes go along it.
struct Mix {
  const float *norm;
  Scalar<double> one_minus_beta;
  float epsilon;
  const float *factors; // t of each tensor with noise; null: 1 for each
};

// Whether kernels get all of it from the host.
inline bool on_host(const Draw &draw, const Mix &mix) {
  return !draw.seed.at && !draw.step.at && !mix.one_minus_beta.at && !mix.factors;
}

struct Losses {
  const float *plus, *minus;
  int64_t n;
  int64_t *counters; // null: none
  bool guided;       // there were no probes, and noise is in proportion to N

  int64_t directions() const { return guided ? 1 : n; }
};

struct Grid {
  float qmin, qmax, offset, r;
};

// A quantizer's Hadamard transform; block 0 is none.
struct Transform {
  int block;
};

// The optimizer's part of the fused tail.
struct Optimizer {
  Rule rule;
  Hyperparameters hyperparameters;
  Scalar<double> lr;
  Scalar<int64_t> count;
  bool master;
};

// The gradients of alphas whose elements several thread blocks hold: two sums for each block, and the `count`
// blocks in which such an alpha begins.
struct AlphaSums {
  double *partial;
  const int32_t *crossing;
  int64_t count;
};

// Places of the coefficients before the B_i: A, 1 if some direction counts, 1 if the norm is lost, and the
// scalars of the optimizer's step.
enum Place { A_AT, NOISE_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT, kCoefficients };

void noise(const Call &call, const Draw &draw);
// tensors: how many sums go to `out`, one for each tensor; 0: one sum of all, or its root
void guide_sumsq(const Call &call, float r, Address<double> partial, Address<void> out, bool root,
                 int64_t tensors);
void quantize(const Call &call, const Grid &grid, Transform transform);
void straight_through_backward(const Call &call, const Grid &grid, StraightThrough kind, Transform transform);
void learned_backward(const Call &call, const Grid &grid, StraightThrough kind, Transform transform,
                      const AlphaSums &sums);
void hadamard(const Call &call, int block);

// partial: one for each block, null where there is no second launch
void measure_alphas(const Where &where, const CellPlan &plan, const Measure &measure, Address<double> partial);

// The build compiles the definition of each of these once for each distribution.
template <Distribution D>
void perturb_quantize(const Call &call, const Draw &draw, const Mix &mix, const Grid &grid, Transform transform,
                      bool plus, bool minus);
template <Distribution D>
void estimate_gradient(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses, float r,
                       Transform transform, float *coefficients);
template <Distribution D>
void estimate_update(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses, const Grid &grid,
                     Transform transform, const Optimizer &optimizer, float *coefficients, bool quantized);

// Writes the coefficients A and B_i of the estimate, and the step's scalars if there is an optimizer.
void write_coefficients(const Call &call, const Draw &draw, const Mix &mix, const Losses &losses,
                        const Optimizer *optimizer, float *coefficients);

} // namespace fogzo::cuda
