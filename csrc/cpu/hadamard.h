// The Hadamard transform of blocks (docs/contract.md, section 4).
#pragma once

#include "tiles.h"

namespace fogzo::cpu {
namespace {

constexpr int kInRegisters = 8; // vectors at a time

// The stage in which an element is added to that of its vector whose number differs in `Bit`: the second of
// such a pair with the opposite sign.
template <int Bit, size_t... Lane> inline F lane_stage(F x, std::index_sequence<Lane...>) {
#if defined(__clang__)
  const F other = __builtin_shufflevector(x, x, int(Lane ^ Bit)...);
#else
  const F other = __builtin_shuffle(x, I{int32_t(Lane ^ Bit)...});
#endif
  return other + F(I(x) ^ I{(Lane & Bit ? INT32_MIN : 0)...});
}

template <int Bit> inline F lane_stages(F x) {
  if constexpr (Bit < kWidth)
    return lane_stages<2 * Bit>(lane_stage<Bit>(x, std::make_index_sequence<kWidth>()));
  else
    return x;
}

// The stages h = Stride, 2 Stride, ... between Count vectors that lie Stride elements apart, and where these
// are the last ones the factor. FIRST: and before them those within a vector.
template <int Block, int Stride, int Count, bool FIRST> inline void stages_of(const float *in, float *out) {
  F x[Count];
#pragma GCC unroll 8
  for (int k = 0; k < Count; ++k) {
    std::memcpy(&x[k], in + k * Stride, sizeof x[k]);
    if (FIRST)
      x[k] = lane_stages<1>(x[k]);
  }
#pragma GCC unroll 8
  for (int h = 1; h < Count; h *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i)
      if (!(i & h)) {
        const F sum = x[i] + x[i + h];
        x[i + h] = x[i] - x[i + h];
        x[i] = sum;
      }
#pragma GCC unroll 8
  for (int k = 0; k < Count; ++k) {
    if (Count * Stride == Block)
      x[k] *= hadamard_factor(Block);
    std::memcpy(out + k * Stride, &x[k], sizeof x[k]);
  }
}

template <int Block, int Stride> void later_stages(float *x, int64_t count) {
  if constexpr (Stride < Block) {
    constexpr int vectors = Block / Stride < kInRegisters ? Block / Stride : kInRegisters;
    for (int64_t i = 0; i < count; i += vectors * Stride)
      for (int64_t j = i; j < i + Stride; j += kWidth)
        stages_of<Block, Stride, vectors, false>(x + j, x + j);
    later_stages<Block, vectors * Stride>(x, count);
  }
}

// H of whole blocks, `out` may be `in`
template <int Block> void rotate(const float *in, float *out, int64_t count) {
  static_assert(kTile % Block == 0 && Block % kWidth == 0,
                "a tile holds whole blocks, and these whole vectors");
  constexpr int vectors = Block / kWidth < kInRegisters ? Block / kWidth : kInRegisters;
  for (int64_t i = 0; i < count; i += vectors * kWidth)
    stages_of<Block, kWidth, vectors, true>(in + i, out + i);
  later_stages<Block, vectors * kWidth>(out, count);
}

void rotate(const float *in, float *out, int64_t count, int block) {
  with_block(block, [&](auto size) { rotate<decltype(size)::value>(in, out, count); });
}

// The latents of a tile as float32, rotated where the quantizer has a transform.
const float *load_rotated(const Operands &item, int64_t start, int64_t count, float *buffer) {
  const float *x = load(item.latent, start, count, buffer);
  if (!item.block)
    return x;
  rotate(x, buffer, count, item.block);
  return buffer;
}

// body(tile, start, stop) for each tile of a range, an item without a transform that has the rotated latents
template <class Body> void for_each_rotated_tile(const Operands &item, int64_t begin, int64_t end, Body body) {
  float latent[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    Operands tile = item;
    tile.latent = tile_span(load_rotated(item, start, count, latent), start);
    tile.block = 0;
    body(tile, start, start + count);
  });
}

void hadamard_range(const Operands &item, int64_t begin, int64_t end) {
  float buffer[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    store(load_rotated(item, start, count, buffer), item.plus, start, count);
  });
}

} // namespace
} // namespace fogzo::cpu
