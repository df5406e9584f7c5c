// The Hadamard transform of consecutive blocks of LATENT into PLUS, which may be LATENT: butterflies in
// float32, stage by stage, then one product.
#include "hadamard.cuh"
#include "launch.cuh"

namespace fogzo::cuda {

struct Hadamard {
  Tables tables;
  Dtypes dtypes;
  float factor;
};

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

// Of each chunk of the block's part, Count of them a thread and turn.
template <int Block, int Count, bool Aligned>
FOGZO_DEVICE void transform_all(const Part &part, Dtype latent_t, Dtype out_t, float factor) {
  const char *in = part.address(LATENT, bytes_of(latent_t));
  char *out = part.address(PLUS, bytes_of(out_t));
  const int chunks = int((part.end() - part.begin) / kChunk);
  // Threads wait for each other, so all take every turn, with or without chunks of their own.
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += Count * kThreads) {
    float x[Count][kChunk] = {};
    const int c = turn + thread();
#pragma unroll
    for (int k = 0; k < Count; ++k)
      if (c + k * kThreads < chunks)
        load_widened<Aligned>(in, c + k * kThreads, latent_t, x[k]);
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      transform<Block>(x[k], factor);
      if (c + k * kThreads < chunks)
        store_chunk<Aligned>(out, c + k * kThreads, x[k], out_t);
    }
  }
}

template <int Block, Dtype L, Dtype O> FOGZO_KERNEL(kThreads, 8) hadamard_kernel(FOGZO_PARAMETER Hadamard p) {
  const Dtype latent_t = actual<L>(p.dtypes.latent), out_t = actual<O>(p.dtypes.out);
  const Part part = part_of(p.tables);
  if (part.aligned())
    transform_all<Block, 2, true>(part, latent_t, out_t, p.factor);
  else
    transform_all<Block, 1, false>(part, latent_t, out_t, p.factor);
}

template <int Block> void (*hadamard_for(const Dtypes &t))(Hadamard) {
  constexpr Dtype f32 = Dtype::float32, b16 = Dtype::bfloat16, any = Dtype::any;
  if (t.latent == f32 && t.out == f32)
    return hadamard_kernel<Block, f32, f32>;
  if (t.latent == b16 && t.out == b16)
    return hadamard_kernel<Block, b16, b16>;
  return hadamard_kernel<Block, any, any>;
}

void hadamard(const Where &where, const Plan &plan, const Dtypes &dtypes, int block) {
  const Hadamard p{tables_of(plan), dtypes, hadamard_factor(block)};
  switch (block) {
#define FOGZO_CASE(size)                                                                                       \
  case size:                                                                                                   \
    return launch("hadamard_kernel", hadamard_for<size>(dtypes), where, plan.blocks, kThreads, p);
    FOGZO_BLOCKS(FOGZO_CASE)
#undef FOGZO_CASE
  }
  throw std::logic_error("hadamard() must know each size of a block");
}

} // namespace fogzo::cuda
