// The Hadamard transform of blocks (docs/contract.md, section 4). Compiled for each instruction set, like
// tiles.h; kWidth are the floats of a vector.

typedef float Lanewise __attribute__((vector_size(4 * kWidth)));
typedef int32_t Words __attribute__((vector_size(4 * kWidth)));

constexpr int kTogether = 8; // vectors that are in registers at a time

// The stage in which an element is added to that of its vector whose number differs in `Bit`: the second of
// such a pair with the opposite sign.
template <int Bit, size_t... I> inline Lanewise lane_stage(Lanewise x, std::index_sequence<I...>) {
#if defined(__clang__)
  const Lanewise other = __builtin_shufflevector(x, x, int(I ^ Bit)...);
#else
  const Lanewise other = __builtin_shuffle(x, Words{int32_t(I ^ Bit)...});
#endif
  return other + Lanewise(Words(x) ^ Words{(I & Bit ? INT32_MIN : 0)...});
}

template <int Bit> inline Lanewise lane_stages(Lanewise x) {
  if constexpr (Bit < kWidth)
    return lane_stages<2 * Bit>(lane_stage<Bit>(x, std::make_index_sequence<kWidth>()));
  else
    return x;
}

// The stages between Count vectors.
template <int Count> inline void vector_stages(Lanewise (&x)[Count]) {
#pragma GCC unroll 8
  for (int h = 1; h < Count; h *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i)
      if (!(i & h)) {
        const Lanewise sum = x[i] + x[i + h];
        x[i + h] = x[i] - x[i + h];
        x[i] = sum;
      }
}

// The stages h = Stride, 2 Stride, ... between Count vectors that lie Stride elements apart, and where these
// are the last ones the factor. FIRST: and before them those within a vector.
template <int Block, int Stride, int Count, bool FIRST> inline void stages_of(const float *in, float *out) {
  Lanewise x[Count];
#pragma GCC unroll 8
  for (int k = 0; k < Count; ++k) {
    std::memcpy(&x[k], in + k * Stride, sizeof x[k]);
    if (FIRST)
      x[k] = lane_stages<1>(x[k]);
  }
  vector_stages(x);
#pragma GCC unroll 8
  for (int k = 0; k < Count; ++k) {
    if (Count * Stride == Block)
      x[k] *= hadamard_factor(Block);
    std::memcpy(out + k * Stride, &x[k], sizeof x[k]);
  }
}

template <int Block, int Stride> void later_stages(float *x, int64_t count) {
  if constexpr (Stride < Block) {
    constexpr int together = Block / Stride < kTogether ? Block / Stride : kTogether;
    for (int64_t i = 0; i < count; i += together * Stride)
      for (int64_t j = i; j < i + Stride; j += kWidth)
        stages_of<Block, Stride, together, false>(x + j, x + j);
    later_stages<Block, together * Stride>(x, count);
  }
}

// H of whole blocks, `out` may be `in`
template <int Block> void rotate(const float *in, float *out, int64_t count) {
  static_assert(kTile % Block == 0 && Block % kWidth == 0,
                "a tile holds whole blocks, and these whole vectors");
  constexpr int together = Block / kWidth < kTogether ? Block / kWidth : kTogether;
  for (int64_t i = 0; i < count; i += together * kWidth)
    stages_of<Block, kWidth, together, true>(in + i, out + i);
  later_stages<Block, together * kWidth>(out, count);
}

void rotate(const float *in, float *out, int64_t count, int block) {
  switch (block) {
#define FOGZO_CASE(size)                                                                                       \
  case size:                                                                                                   \
    return rotate<size>(in, out, count);
    FOGZO_BLOCKS(FOGZO_CASE)
#undef FOGZO_CASE
  }
}

void hadamard_range(const Item &item, int64_t begin, int64_t end) {
  float buffer[kTile], x[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    rotate(load(item.latent, start, count, buffer), x, count, item.block);
    store(x, item.plus, start, count);
  });
}
