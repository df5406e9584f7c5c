// The Hadamard transform of consecutive blocks of LATENT into PLUS, which may be LATENT: butterflies in
// float32, stage by stage, then one product.
#include "hadamard.cuh"
#include "launch.cuh"

namespace fogzo::cuda {

struct Hadamard {
  Plan plan;
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
  unrolled<kChunk>([&](int i) { x[i] *= factor; });
}

// Transforms each chunk of the block's part, Count of them a thread and turn.
template <int Block, int Count, bool Aligned>
FOGZO_DEVICE void transform_all(const Part &part, const Dtypes &t, float factor) {
  const Operand in = part.operand(LATENT, t.latent), out = part.operand(PLUS, t.out);
  const int chunks = int((part.end() - part.begin) / kChunk);
  // Threads wait for each other, so all take every turn, with or without chunks of their own.
#pragma unroll 1
  for (int turn = 0; turn < chunks; turn += Count * kThreads) {
    float x[Count][kChunk] = {};
    const int c = turn + thread();
    unrolled<Count>([&](int k) {
      if (c + k * kThreads < chunks)
        widen(load_chunk<Aligned>(in, int64_t(c + k * kThreads)), t.latent, x[k]);
    });
    unrolled<Count>([&](int k) {
      transform<Block>(x[k], factor);
      if (c + k * kThreads < chunks)
        store_chunk<Aligned>(out, int64_t(c + k * kThreads), x[k]);
    });
  }
}

template <int Block, class T> FOGZO_KERNEL(kThreads, 8) hadamard_kernel(FOGZO_PARAMETER Hadamard p) {
  const Part part = part_of(p.plan);
  if (part.aligned())
    transform_all<Block, 2, true>(part, T::of(p.dtypes), p.factor);
  else
    transform_all<Block, 1, false>(part, T::of(p.dtypes), p.factor);
}

void hadamard(const Call &call, int block) {
  const Hadamard p{call.plan, call.dtypes, hadamard_factor(block)};
  with_block(block, [&](auto size) {
    launch_for<Float32, Bfloat16, Any>("hadamard_kernel", call, call.dtypes, p, [](auto t) {
      return hadamard_kernel<decltype(size)::value, decltype(t)>;
    });
  });
}

} // namespace fogzo::cuda
