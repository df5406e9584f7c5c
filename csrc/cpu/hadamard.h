// The Hadamard transform of blocks (docs/contract.md, section 4). Compiled for each instruction set, like
// tiles.h.

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Places __attribute__((vector_size(32)));

#if defined(__clang__)
#define FOGZO_PLACED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define FOGZO_PLACED(x, ...) __builtin_shuffle(x, Places{__VA_ARGS__})
#endif

// The first stages, within each 8 elements: each element is added to the other one of its pair, the second of a
// pair with the opposite sign. As scalars the compiler makes slow vectors of them.
inline void first_butterflies(const float *in, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    Eight x;
    std::memcpy(&x, in + i, sizeof x);
    x = FOGZO_PLACED(x, 1, 0, 3, 2, 5, 4, 7, 6) + x * Eight{1, -1, 1, -1, 1, -1, 1, -1};
    x = FOGZO_PLACED(x, 2, 3, 0, 1, 6, 7, 4, 5) + x * Eight{1, 1, -1, -1, 1, 1, -1, -1};
    x = FOGZO_PLACED(x, 4, 5, 6, 7, 0, 1, 2, 3) + x * Eight{1, 1, 1, 1, -1, -1, -1, -1};
    std::memcpy(out + i, &x, sizeof x);
  }
}
#undef FOGZO_PLACED

// The stages h = H, 2 H, .., Block / 2 of whole blocks.
template <int H, int Block> void butterflies(float *x, int64_t count) {
  if constexpr (H < Block) {
    for (int64_t i = 0; i < count; i += 2 * H)
      FOGZO_LOOP(int64_t j = i; j < i + H; ++j) butterfly(x[j], x[j + H]);
    butterflies<2 * H, Block>(x, count);
  }
}

// H of whole blocks, `out` may be `in`
template <int Block> void rotate(const float *in, float *out, int64_t count) {
  static_assert(kTile % Block == 0 && Block >= 8, "a tile holds whole blocks, and these whole registers");
  const float factor = hadamard_factor(Block);
  first_butterflies(in, out, count);
  butterflies<8, Block>(out, count);
  FOGZO_LOOP(int64_t i = 0; i < count; ++i) out[i] *= factor;
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
