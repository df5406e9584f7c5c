// The estimate and the fused tail, as perturbation in fused.h.

// B m, added to what there is so far
inline F with_noise(F B, F m, bool begun, const F &so_far) { return begun ? fused(B, m, so_far) : B * m; }

// sum_i B_i m_i of a block's elements, each vector in the order of load_two()
template <Distribution D, bool PAIRS>
inline void accumulate(const Estimate &e, Keys &keys, const Chunks &chunks, F *acc) {
  for (int64_t direction = 0; direction < e.directions; ++direction) {
    H halves[kHalves];
    set_direction(keys, uint32_t(direction));
    philox_block<PAIRS>(keys, chunks, halves);
    const F B = broadcast(e.B[direction] / Drawn<D>::factor);
#pragma GCC unroll 1
    for (int h = 0; h < kHalves; ++h) {
      F m0, m1;
      noise_of<D, PAIRS>(halves[h], m0, m1);
      acc[2 * h] = with_noise(B, m0, direction, acc[2 * h]);
      acc[2 * h + 1] = with_noise(B, m1, direction, acc[2 * h + 1]);
    }
  }
}

// Element j goes to element j - shift of out.
struct Target {
  void *data;
  int64_t shift;
};

template <Distribution D, Dtype G, Dtype O>
void estimate_run(const Item &item, const Estimate &e, Stream &stream, const Target &out, const Run &run) {
  constexpr bool PAIRS = in_pairs<G>(O);
  const F A = broadcast(e.A), inv = broadcast(run.scale.inv);
  void *const grad = item.grad.data, *const to = out.data;
  RunNoise<D, PAIRS> noise;
  F acc[2 * kDrawn];
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t count = drawn_at(run, i);
    for (int64_t direction = 0; direction < e.directions; ++direction) {
      stream.turn_to(run.chunk, uint32_t(direction));
      noise.draw(stream, run.chunk_at(i), count);
      const F B = broadcast(e.B[direction] / Drawn<D>::factor);
      const bool last = direction + 1 == e.directions;
      for (int64_t h = 0; h < count; ++h) {
        F m0, m1;
        noise.get(h, m0, m1);
        const F a0 = with_noise(B, m0, direction, acc[2 * h]),
                a1 = with_noise(B, m1, direction, acc[2 * h + 1]);
        if (!last) {
          acc[2 * h] = a0, acc[2 * h + 1] = a1;
          continue;
        }
        const int64_t j = i + 2 * kWidth * h;
        F g0, g1;
        prefetch<G, 1>(grad, j);
        load_two<G, PAIRS>(grad, j, g0, g1);
        store_two<O, PAIRS, Narrow::any>(to, j - out.shift, fused(A, g0, inv * a0), fused(A, g1, inv * a1));
      }
    }
    i += count * 2 * kWidth;
  }
}

template <Distribution D, Dtype G, Dtype O>
void estimate_piece(const Item &item, const Estimate &e, Keys &keys, const Target &out, const Piece &piece) {
  constexpr bool PAIRS = in_pairs<G>(O);
  const F A = broadcast(e.A), inv = broadcast(1.0f) / load_floats(piece.delta);
  F acc[kVectors];
  accumulate<D, PAIRS>(e, keys, load_chunks<PAIRS>(piece.chunk), acc);
  Buffer<G> grads;
  Buffer<O> estimates;
  const void *grad = grads.read(item.grad.data, piece);
  for (int h = 0; h < kHalves; ++h) {
    F g0, g1;
    load_two<G, PAIRS>(grad, 2 * kWidth * h, g0, g1);
    const F inv0 = spread<PAIRS>(inv, 2 * h), inv1 = PAIRS ? inv0 : spread<PAIRS>(inv, 2 * h + 1);
    store_two<O, PAIRS, Narrow::any>(estimates.bytes, 2 * kWidth * h, fused(A, g0, inv0 * acc[2 * h]),
                                     fused(A, g1, inv1 * acc[2 * h + 1]));
  }
  estimates.write(at(out.data, O, -out.shift), piece);
}

struct EstimateKernels {
  void (*run)(const Item &, const Estimate &, Stream &, const Target &, const Run &);
  void (*piece)(const Item &, const Estimate &, Keys &, const Target &, const Piece &);
};

template <Distribution D> EstimateKernels estimate_for(Dtype grad, bool widen) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16;
#define FOGZO_CASE(G, O)                                                                                       \
  {                                                                                                            \
    estimate_run<D, G, O>, estimate_piece<D, G, O>                                                             \
  }
  if (grad == f32)
    return FOGZO_CASE(f32, f32);
  if (grad == bf16)
    return widen ? EstimateKernels FOGZO_CASE(bf16, f32) : EstimateKernels FOGZO_CASE(bf16, bf16);
  return widen ? EstimateKernels FOGZO_CASE(f16, f32) : EstimateKernels FOGZO_CASE(f16, f16);
#undef FOGZO_CASE
}

EstimateKernels estimate_for(Distribution d, Dtype grad, bool widen) {
  switch (d) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Distribution::name:                                                                                     \
    return estimate_for<Distribution::name>(grad, widen);
    FOGZO_DISTRIBUTIONS(FOGZO_CASE)
#undef FOGZO_CASE
  }
  __builtin_trap(); // no value of the enumeration
}

// widen: to float32, else to the dtype of the gradient
void estimate_to(const Item &item, const Estimate &e, const Target &out, bool widen, int64_t begin,
                 int64_t end) {
  const EstimateKernels kernels = estimate_for(e.noise.distribution, item.grad.dtype, widen);
  Stream stream(names_in(e.noise, item));
  for_each_run(
      item, e.r, begin, end, [&](const Run &run) { kernels.run(item, e, stream, out, run); },
      [&](const Piece &piece) { kernels.piece(item, e, stream.keys, out, piece); });
}

void estimate_fused(const Item &item, const Estimate &e, int64_t begin, int64_t end) {
  if (better_by_tiles(item))
    return estimate_range(item, e, begin, end);
  estimate_to(item, e, {item.grad.data, 0}, false, begin, end);
}

void update_fused(const Item &item, const Tail &tail, int64_t begin, int64_t end) {
  if (better_by_tiles(item))
    return update_range(item, tail, begin, end);
  update_by(item, tail, begin, end, [&](int64_t start, int64_t count, float *out) {
    estimate_to(item, tail.estimate, {out, start}, true, start, start + count);
  });
}
