// The Hadamard transform of a thread's chunks: butterflies in float32, stage by stage, then one product.
//
// A thread holds chunks of 8 elements. Stages h = 1, 2, 4 are its own; up to h = 128 the other element lies in
// the same warp, and beyond that in another one, and goes by shared memory.
#pragma once

#include "tiles.cuh"

namespace fogzo::cuda {

constexpr int kWarp = 32; // threads

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

template <int Block> FOGZO_DEVICE void transform(float (&x)[kChunk], float factor) {
  constexpr int kThreadsOfBlock = Block / kChunk;
  static_assert(Block >= kChunk && kThreadsOfBlock <= kThreads, "a turn of the threads has whole blocks");
  own_stages(x);
#pragma unroll
  for (int bit = 1; bit < kWarp && bit < kThreadsOfBlock; bit *= 2)
    stage_between<false>(x, bit);
#pragma unroll
  for (int bit = kWarp; bit < kThreadsOfBlock; bit *= 2)
    stage_between<true>(x, bit);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] *= factor;
}

constexpr int kCommonBlock = 128; // code of its own; Block 0 in a template: the run knows the size

// Of a block of threads all come here, those without a chunk too.
template <int Block> FOGZO_DEVICE void transform_of(float (&x)[kChunk], int block) {
  if constexpr (Block != 0)
    return transform<Block>(x, hadamard_factor(Block));
  const int threads = block / kChunk;
  own_stages(x);
#pragma unroll 1
  for (int bit = 1; bit < kWarp && bit < threads; bit *= 2)
    stage_between<false>(x, bit);
#pragma unroll 1
  for (int bit = kWarp; bit < threads; bit *= 2)
    stage_between<true>(x, bit);
  const float factor = hadamard_factor(block);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] *= factor;
}

// Chunk c of the block's part of an operand. Where tensors are not aligned, by elements.
template <bool Aligned>
FOGZO_DEVICE void load_part(const Part &part, Column column, int c, Dtype dtype, float (&x)[kChunk]) {
  if constexpr (Aligned)
    widen(load_chunk(part.address(column, bytes_of(dtype)), c, dtype), dtype, x);
  else
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = load_element(part.pointer<void>(column), part.begin + c * kChunk + i, dtype);
}

template <bool Aligned>
FOGZO_DEVICE void store_part(const Part &part, Column column, int c, Dtype dtype, const float (&x)[kChunk]) {
  if constexpr (Aligned)
    store_chunk(part.address(column, bytes_of(dtype)), c, x, dtype);
  else
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      store_element(part.pointer<void>(column), part.begin + c * kChunk + i, x[i], dtype);
}

// Codes, or values, of a chunk's positions.
template <bool Aligned>
FOGZO_DEVICE void quantize_part(const Part &part, Column column, int c, Dtype dtype, const float (&y)[kChunk],
                                const Scale &scale, const Grid &grid) {
  if constexpr (Aligned)
    store_quantized(part.address(column, bytes_of(dtype)), c, y, scale.delta, grid, dtype);
  else
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      store_quantized_element(part.pointer<void>(column), part.begin + c * kChunk + i, y[i], scale.delta, grid,
                              dtype);
}

// body(c, some) for each chunk of the block's part. Threads wait for each other in a transform, so all take
// every turn: those without a chunk of their own (some is false) compute with the first one and store nothing.
template <class Body> FOGZO_DEVICE void every_chunk(const Part &part, Body body) {
  const int chunks = int((part.end() - part.begin) / kChunk);
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += kThreads) {
    const int c = turn + thread();
    body(c < chunks ? c : 0, c < chunks);
  }
}

} // namespace fogzo::cuda
