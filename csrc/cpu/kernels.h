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
struct Item {
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

constexpr int64_t kBlock = 32768; // elements of a range, at most; fixed, so that sums do not depend on threads

// The kernels, compiled for one instruction set. All sets give the same bits.
struct Kernels {
  const char *isa;
  void (*noise)(const Noise &noise, const Layout &layout, float scale, float *out, int64_t begin, int64_t end);
  double (*sumsq)(const Item &item, float r, int64_t begin, int64_t end);
  void (*perturb)(const Item &item, const Perturbation &p, int64_t begin, int64_t end);
  void (*estimate)(const Item &item, const Estimate &e, int64_t begin, int64_t end);
  void (*update)(const Item &item, const Tail &tail, int64_t begin, int64_t end);
  void (*quantize)(const Item &item, GridRange grid, float r, int64_t begin, int64_t end);
  // reads grad, writes plus (which may be the same memory)
  void (*straight_through)(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin,
                           int64_t end);
  // alphas, into plus, of whole cells
  void (*measure)(const Item &item, const Measure &measure, int64_t begin, int64_t end);
  // what a piece of a cell comes to
  double (*total)(const Item &item, Statistic statistic, int64_t begin, int64_t end);
  // the same, and alpha_grad of the alphas whose elements all lie in the range
  Cut (*learned)(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin, int64_t end);
  // H of latent, into plus (which may be the same memory)
  void (*hadamard)(const Item &item, int64_t begin, int64_t end);
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels(); // these two where the compiler's target is x86-64
const Kernels *avx512_kernels();

// Kernels that this processor can run, the best ones first.
std::vector<const Kernels *> usable_kernels();

// The best one, or the one that FOGZO_CPU_ISA names; throws std::invalid_argument where it cannot run.
const Kernels &kernels();

} // namespace fogzo::cpu
