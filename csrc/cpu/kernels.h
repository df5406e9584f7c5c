// The CPU kernels: plain pointers in, no torch. Each works on one contiguous range of one tensor, so
// that the caller decides how ranges are spread over threads and results never depend on it.
#pragma once

#include "../element.h"

#include <cstdint>
#include <vector>

namespace fogzo::cpu {

// Where a shard lies in its parameter: e(j) = offset + (j / inner) * stride + j % inner.
struct Layout {
  int64_t offset, inner, stride;
};

struct Span {
  void *data = nullptr; // null: absent
  Dtype dtype = Dtype::float32;
};

// One tensor of a list.
struct Operands {
  int64_t numel = 0, scale_length = 1; // elements that share one alpha
  const float *alpha = nullptr;        // null in the fused tail: not quantized
  float *alpha_grad = nullptr;         // of learned scales, as many
  double factor = 1.0;                 // of alpha_grad
  Span latent, grad, plus, minus;      // quantize writes plus; estimate and straight-through write grad
  Span master, first, second;          // of the fused tail, float32; plus receives Q
  Layout layout{0, 1, 1};
  uint32_t tensor_id = 0;
  int block = 0; // elements of a block of the Hadamard transform; 0: none
};

struct Noise {
  Distribution distribution;
  Names names; // tensor_id comes from the item, direction from the loop
};

struct Perturbation {
  Noise noise;
  GridRange grid;
  float r, a, b, epsilon;
};

struct Estimate {
  Noise noise;
  float r, A;
  const float *B; // one per direction
  int64_t directions;
};

struct Tail {
  Estimate estimate; // no directions: G = g
  Update update;
  GridRange grid;
  bool skip; // write only Q
};

// Sums of the two alphas that the ends of a range may cut: the one that began before it, and the one that
// begins in it and ends behind it. A range within an alpha that began before has only the first.
struct Cut {
  double before = 0, behind = 0;
};

constexpr int64_t kRange = 32768; // elements of a range, at most; fixed, so that sums do not depend on threads

// A kernel works on the elements begin .. end - 1 of one tensor.
template <class Result, class... Arguments>
using Kernel = Result (*)(const Operands &item, Arguments..., int64_t begin, int64_t end);

// The kernels, compiled for one instruction set. All sets give the same bits.
struct Kernels {
  const char *isa;
  Kernel<void, const Noise &, float> noise; // times the number, into plus
  Kernel<double, float> sumsq;              // with r
  Kernel<void, const Perturbation &> perturb;
  Kernel<void, const Estimate &> estimate;
  Kernel<void, const Tail &> update;
  Kernel<void, GridRange, float> quantize; // with r, as all that follow a grid
  // reads grad, writes plus (which may be the same memory)
  Kernel<void, StraightThrough, GridRange, float> straight_through;
  Kernel<void, const Measure &> measure; // alphas, into plus, of whole cells
  Kernel<double, Statistic> total;       // of a piece of a cell
  // as straight_through, and alpha_grad of the alphas whose elements all lie in the range
  Kernel<Cut, StraightThrough, GridRange, float> learned;
  Kernel<void> hadamard; // of latent, into plus (which may be the same memory)
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels(); // these two where the compiler's target is x86-64
const Kernels *avx512_kernels();

// Kernels that this processor can run, the best ones first.
std::vector<const Kernels *> usable_kernels();

// Whether the processor is Intel's. It tunes how kernels use the memory, and changes no result.
extern const bool on_intel;

// The best one, or the one that FOGZO_CPU_ISA names; throws std::invalid_argument where it cannot run.
const Kernels &kernels();

} // namespace fogzo::cpu
