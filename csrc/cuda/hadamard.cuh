// The Hadamard transform in registers, of threads that hold chunks of 8 elements: butterflies in float32,
// stage by stage, then one product.
//
// Stages h = 1, 2, 4 are a thread's own. Beyond that the other element lies with another thread of the same
// warp, or in another warp, and then goes by shared memory.
#pragma once

#include "tiles.cuh"

namespace fogzo::cuda {

// The stages within a chunk.
FOGZO_DEVICE void own_stages(float (&x)[kChunk]) {
#pragma unroll
  for (int h = 1; h < kChunk; h *= 2)
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (!(i & h))
        butterfly(x[i], x[i + h]);
}

// The chunk of the thread whose number differs in `bit`, which may be of another warp.
FOGZO_DEVICE void from_block(const float (&x)[kChunk], int bit, float (&other)[kChunk]) {
  FOGZO_SHARED float held[kChunk][kThreads];
  barrier(); // all have read what lay there
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    held[i][thread()] = x[i];
  barrier();
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    other[i] = held[i][thread() ^ bit];
}

// a + b for the thread of a, a - b for that of b: the product by 1 or -1 is exact, so it rounds once.
template <bool Far> FOGZO_DEVICE void stage_between(float (&x)[kChunk], int bit) {
  float other[kChunk];
  if (Far)
    from_block(x, bit, other);
  else
    from_warp(x, bit, other);
  const float sign = thread() & bit ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] = std::fma(sign, x[i], other[i]);
}

// ---- of a quantizer: blocks of a size that the run knows, in pairs of chunks

// A thread holds two chunks that lie half a block apart, so that the last stage is its own.
struct Rotation {
  int half; // of a block, in chunks: so many threads hold one
  float factor;
};

inline Rotation rotation_of(int block) { return {block / (2 * kChunk), hadamard_factor(block)}; }

constexpr bool pairs_hold_all_blocks() {
  for (int block : kBlocks)
    if (block < 2 * kChunk || block > 4 * kChunk * kWarp)
      return false;
  return true;
}
static_assert(pairs_hold_all_blocks(), "two warps must hold a block in pairs of chunks");

constexpr int kPairs = 2 * kThreads; // chunks of a turn of the threads

// Whether stages go between warps: those kernels alone have barriers.
inline bool between_warps(int block) { return block > 2 * kChunk * kWarp; }

// What a kernel around a transform is told; threads wait for each other, so all of them take every turn.
template <class P> struct Rotated {
  P op;
  Rotation rotation;
};

// The chunks of a thread in the turn that begins with chunk `turn`. Without chunks of its own it reads the
// block's first, and must not write.
struct TwoChunks {
  int first, second;
  bool some;
};

FOGZO_DEVICE TwoChunks two_chunks(const Rotation &rotation, int turn, int chunks) {
  const int first = turn + 2 * thread() - (thread() & (rotation.half - 1)), at = first < chunks ? first : 0;
  return {at, at + rotation.half, first < chunks};
}

FOGZO_DEVICE int all_chunks(const Part &part) { return int((part.end() - part.begin) / kChunk); }

// H of the blocks that the threads hold. Far: some stage may go between warps.
template <bool Far> FOGZO_DEVICE void rotate(float (&x)[2][kChunk], const Rotation &rotation) {
  own_stages(x[0]);
  own_stages(x[1]);
#pragma unroll 1
  for (int bit = 1; bit < rotation.half && (!Far || bit < kWarp); bit *= 2) {
    stage_between<false>(x[0], bit);
    stage_between<false>(x[1], bit);
  }
  if (Far && rotation.half > kWarp) {
    stage_between<true>(x[0], kWarp);
    stage_between<true>(x[1], kWarp);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    butterfly(x[0][i], x[1][i]);
    x[0][i] *= rotation.factor;
    x[1][i] *= rotation.factor;
  }
}

} // namespace fogzo::cuda
