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

// Gives the chunk of the thread whose number differs in `bit`, also of another warp.
FOGZO_DEVICE void from_block(const float (&x)[kChunk], int bit, float (&other)[kChunk]) {
  FOGZO_SHARED float exchange[kChunk][kThreads];
  barrier(); // until all threads have read what the last call wrote
  unrolled<kChunk>([&](int i) { exchange[i][thread()] = x[i]; });
  barrier();
  unrolled<kChunk>([&](int i) { other[i] = exchange[i][thread() ^ bit]; });
}

// One stage: a + b for the thread of a, a - b for the thread of b. The product by 1 or -1 is exact, so that the
// result rounds once.
template <bool Far> FOGZO_DEVICE void stage_between(float (&x)[kChunk], int bit) {
  float other[kChunk];
  if (Far)
    from_block(x, bit, other);
  else
    unrolled<kChunk>([&](int i) { other[i] = from_warp(x[i], bit); });
  const float sign = thread() & bit ? -1.0f : 1.0f;
  unrolled<kChunk>([&](int i) { x[i] = std::fma(sign, x[i], other[i]); });
}

// ---- a quantizer's transform: the run knows its block, and a thread takes two chunks of it

// The two chunks lie half a block apart, so that the last stage is the thread's own.
struct Rotation {
  int half; // of a block, in chunks: so many threads hold one block
  float factor;
};

inline Rotation rotation_of(Transform transform) {
  return {transform.block / (2 * kChunk), hadamard_factor(transform.block)};
}

constexpr bool pairs_hold_all_blocks() {
  for (int block : kBlocks)
    if (block < 2 * kChunk || block > 4 * kChunk * kWarp)
      return false;
  return true;
}
static_assert(pairs_hold_all_blocks(), "two warps must hold a block in pairs of chunks");

// Only the kernels for any dtypes have stages between warps, and so barriers. They serve the large blocks.
inline Dtypes dtypes_around(Transform transform, const Dtypes &dtypes) {
  constexpr Dtype any = Dtype::any;
  return transform.block > 2 * kChunk * kWarp ? Dtypes{any, any, any} : dtypes;
}

// Transforms the blocks that the threads hold. Far: some stage may go between warps.
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
  unrolled<kChunk>([&](int i) {
    butterfly(x[0][i], x[1][i]);
    x[0][i] *= rotation.factor;
    x[1][i] *= rotation.factor;
  });
}

// A thread's two chunks, which have one scale.
template <bool Far, bool Aligned> struct TwoChunks : Chunks<2, Aligned, false> {
  static constexpr bool transformed = true;
  Rotation rotation;
  Scale shared;
  bool some;

  FOGZO_DEVICE Scale scale(int) const { return shared; }
  FOGZO_DEVICE int64_t number(int k) const {
    return chunk_number<false>(this->frame.layout, this->first) + k * this->step;
  }
  FOGZO_DEVICE void transform(float (&x)[2][kChunk]) const { rotate<Far>(x, rotation); }
};

// The place of a thread's first chunk. The blocks of `threads` follow each other in memory.
FOGZO_DEVICE int first_of_two(const Rotation &rotation, int thread) {
  return 2 * thread - (thread & (rotation.half - 1));
}

template <bool Far, bool Aligned, class F>
FOGZO_DEVICE void walk_aligned(const Frame<false> &frame, const Rotation &rotation, F f) {
  const int chunks = int((frame.part.end() - frame.part.begin) / kChunk);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += 2 * kThreads) {
    const int first = turn + first_of_two(rotation, thread()), at = first < chunks ? first : 0;
    const Scale scale = chunk_scale<false>(frame.scales, at);
    f(TwoChunks<Far, Aligned>{{frame, at, rotation.half}, rotation, scale, first < chunks});
  }
}

// Gives the block's chunks to f, two a thread and turn. Threads wait for each other, so all take every turn;
// one without chunks of its own may read the first ones, which another thread may be writing.
template <bool Far, class F>
FOGZO_DEVICE void walk_rotated(const Frame<false> &frame, const Rotation &rotation, F f) {
  if (frame.part.aligned())
    walk_aligned<Far, true>(frame, rotation, f);
  else
    walk_aligned<Far, false>(frame, rotation, f);
}

} // namespace fogzo::cuda
