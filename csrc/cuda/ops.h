// The CUDA ops' interface: addresses, counts and scalars in, one or two launches out. No torch, no CUDA
// header, so that one build serves every release of PyTorch and the callers compile without nvcc.
#pragma once

#include "../element.h"

#include <cstdint>
#include <string>

namespace fogzo::cuda {

enum class Dtype { FOGZO_DTYPES(FOGZO_ENUMERATOR) any }; // any: known when it runs

// Columns of a row of the table (fogzo_kernels/plans.py), in order.
#define FOGZO_COLUMNS                                                                                          \
  LATENT, GRAD, PLUS, MINUS, ALPHA, TENSOR_ID, NUMEL, FAST, ALIGNED, FIRST, OFFSET, INNER, SKIP, SPAN,         \
      SCALE_LENGTH, INNER_DIVISOR, SCALE_DIVISOR, STATE_1, STATE_2, ALPHA_GRAD, FACTOR

enum Column { FOGZO_COLUMNS, COLUMNS };

// Of a row of a reduction over cells (fogzo_kernels/backends/cells.py).
#define FOGZO_CELL_COLUMNS DATA, ALPHA, LENGTH, CELLS, ALIGNED, FIRST, PACK, PIECES, SECOND, THREADS, WIDTH

namespace cells {
enum Column { FOGZO_CELL_COLUMNS, COLUMNS };
} // namespace cells

constexpr int kSpan = 16384;  // elements of a block in a reduction over cells, and the most elsewhere
constexpr int kThreads = 128; // of a block
constexpr int kWarp = 32;     // threads that run together
constexpr int kChunk = 8;     // elements of a Philox call

struct Where {
  int device;
  uintptr_t stream;
};

// A plan: what each block works on, as long as its row's SPAN says.
struct Plan {
  const int64_t *table;
  const int32_t *owner;
  int64_t blocks;
  bool per_tensor, shard;
};

// Sums of the gradients of alphas that several blocks hold: two for each block; and those blocks, `count` of
// them, in which such an alpha begins.
struct AlphaSums {
  double *partial;
  const int32_t *crossing;
  int64_t count;
};

// The same as a plan of a reduction over cells; the second launch joins what pieces of long cells come to.
struct CellPlan {
  const int64_t *table;
  const int32_t *owner, *second_owner;
  int64_t blocks, second_blocks;
};

// A scalar on the host, or in device memory where `at` is not null.
template <class T> struct Scalar {
  const T *at;
  T value;
};

struct Step {
  Scalar<int64_t> seed, step;
  Scalar<double> one_minus_beta;
  bool on_host() const { return !seed.at && !step.at && !one_minus_beta.at; }
};

struct Losses {
  const float *plus, *minus;
  int64_t n;
  const float *norm;
  int64_t *counters; // null: none
  double epsilon;
};

struct Grid {
  float qmin, qmax, offset, r;
};

struct Dtypes {
  Dtype latent, grad, out;
};

// Which noise, but for the direction.
struct Draw {
  Distribution distribution;
  double C;
  Step step;
};

// The optimizer's part of the fused tail.
struct Optimizer {
  Rule rule;
  Hyperparameters hyperparameters;
  Scalar<double> lr;
  Scalar<int64_t> count;
};

constexpr int kEstimateCoefficients = 2, kUpdateCoefficients = 6; // before the B_i

// block: of the quantizer's transform, 0 for none
void noise(const Where &where, const Plan &plan, const Draw &draw, uint32_t direction);
void guide_sumsq(const Where &where, const Plan &plan, Dtype grad, float r, double *partial, void *out,
                 bool root);
void perturb_quantize(const Where &where, const Plan &plan, const Dtypes &dtypes, bool plus, bool minus,
                      const Draw &draw, uint32_t direction, const float *norm, const Grid &grid, double epsilon,
                      int block);
void estimate_gradient(const Where &where, const Plan &plan, Dtype grad, const Draw &draw, const Losses &losses,
                       float r, float *coefficients, int block);
void estimate_update(const Where &where, const Plan &plan, const Dtypes &dtypes, bool master, bool quantized,
                     const Draw &draw, const Losses &losses, const Grid &grid, const Optimizer &optimizer,
                     float *coefficients, int block);
void quantize(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid, int block);
void straight_through_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                               StraightThrough kind, int block);
void learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                      StraightThrough kind, const AlphaSums &sums);
void rotated_learned_backward(const Where &where, const Plan &plan, const Dtypes &dtypes, const Grid &grid,
                              StraightThrough kind, const AlphaSums &sums, int block);

// partial: one for each block, null where there is no second launch
void measure_alphas(const Where &where, const CellPlan &plan, Dtype data, const Measure &measure,
                    double *partial);

// H of the latents into the outputs.
void hadamard(const Where &where, const Plan &plan, const Dtypes &dtypes, int block);

// The factor that the kernels' noise has over m, and that its coefficient has under C.
double noise_factor(Distribution distribution);

} // namespace fogzo::cuda
