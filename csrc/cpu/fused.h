// The fused paths of perturbation and estimate: noise, mixing and rounding in registers, for runs of
// elements that share one alpha and whose numbers follow one another; tiles.h does the rest. The file
// that includes this one has defined vectors of kWidth floats F, halves H, bits U, and their operations.

constexpr int kVectors = 2 * kHalves;         // F per block
constexpr int64_t kBlock = kVectors * kWidth; // elements per block
static_assert(kBlock == 8 * kGroup, "a block is what one call of philox_block draws");

// noise_of() gives m times this power of two, which the caller takes out of the coefficient of m: exact.
template <Distribution D>
constexpr float kFactor = D == Distribution::uniform      ? 32768.0f
                          : D == Distribution::triangular ? 65536.0f
                                                          : 1.0f;

// m kFactor of the elements of h
template <Distribution D> inline void noise_of(H h, F &first, F &last) {
  U low, high;
  if (D == Distribution::gaussian) { // Box-Muller on words: the pair of an even and an odd element
    const U words = words_of(h);
    const F radius = root(log_of((float_from(words & 0xFFFFu) + 0.5f) * (1.0f / 65536)) * -2.0f);
    F cosine, sine; // the angle is (2 ks + 1) / 65536 = (65536 ks + 32768) / 2^31
    cos_sin_pi(float_from((words & 0xFFFF0000u) | 0x8000u) * (1.0f / 2147483648.0f), cosine, sine);
    return interleave(radius * cosine, radius * sine, first, last);
  }
  if (D == Distribution::logistic) {
    extend(h, low, high);
    const F a = float_from(low), b = float_from(high);
    first = log_of((a + 0.5f) / (65535.5f - a));
    last = log_of((b + 0.5f) / (65535.5f - b));
    return;
  }
  raise(D == Distribution::triangular ? byte_sums(h) : h, D == Distribution::uniform ? -0x8000 : 0, low, high);
  if (D == Distribution::rademacher) {
    first = float_of((low & 0x80000000u) | 0x3F800000u);
    last = float_of((high & 0x80000000u) | 0x3F800000u);
  } else {
    first = float_from(low);
    last = float_from(high);
  }
}

struct Run {
  int64_t begin, end; // local elements: whole blocks
  uint64_t chunk;     // of the first one
  Scale scale;
};

// Cuts a range into runs for `fast(run)` and remainders for `rest(begin, end)`.
template <class Fast, class Rest>
void for_each_run(const Item &item, float r, int64_t begin, int64_t end, Fast fast, Rest rest) {
  const Layout &layout = item.layout;
  int64_t done = begin; // what is before it was handed out
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / layout.inner, group = start / item.scale_length;
    const int64_t last = least(end, least((row + 1) * layout.inner, (group + 1) * item.scale_length));
    const int64_t e = layout.offset + row * layout.stride + start % layout.inner;
    const int64_t first = start + (-e & 7), blocks = (last - first) / kBlock;
    if (first < last && blocks > 0) {
      if (done < first)
        rest(done, first);
      done = first + blocks * kBlock;
      fast(Run{first, done, uint64_t(e + (first - start)) >> 3, make_scale(item.alpha[group], r)});
    }
    start = last;
  }
  if (done < end)
    rest(done, end);
}

constexpr int64_t kAhead = 1024; // elements; the hardware's own prefetching stops at each page

constexpr int64_t size_of(Dtype t) { return t == Dtype::float32 ? 4 : t == Dtype::int8 ? 1 : 2; }

// The block that lies kAhead elements after element i.
template <Dtype T, int WRITE> inline void prefetch(const void *data, int64_t i) {
  const char *at = static_cast<const char *>(data) + (i + kAhead) * size_of(T);
  for (int64_t line = 0; line < kBlock * size_of(T); line += 64)
    __builtin_prefetch(at + line, WRITE);
}

// ---- perturb and quantize

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH>
void perturb_run(const Item &item, const Perturbation &p, const Keys &keys, const Run &run) {
  const F inv = broadcast(run.scale.inv), delta = broadcast(run.scale.delta);
  const F offset = broadcast(-p.grid.offset), shift = broadcast(run.scale.delta * p.grid.offset);
  const F gam = broadcast(p.a * run.scale.delta), b = broadcast(p.b / kFactor<D>), eps = broadcast(p.epsilon);
  const F qmin = broadcast(p.grid.qmin), qmax = broadcast(p.grid.qmax);
  void *const plus = item.plus.data ? item.plus.data : item.minus.data, *const minus = item.minus.data;
  const F sign = item.plus.data ? eps : F{} - eps;
  const auto quantized = [&](F y) {
    const F code = rounded(smaller(larger(y, qmin), qmax));
    return O == Dtype::int8 ? code : fused(code, delta, shift); // the bits of delta * (code + offset)
  };
  uint64_t chunk = run.chunk;
  for (int64_t i = run.begin; i < run.end; chunk += kGroup) {
    H halves[kHalves];
    prefetch<L, 0>(item.latent.data, i);
    prefetch<G, 0>(item.grad.data, i);
    prefetch<O, 1>(plus, i);
    philox_block(keys, chunk, halves);
#pragma GCC unroll 1
    for (int h = 0; h < kHalves; ++h) {
      F m[2];
      noise_of<D>(halves[h], m[0], m[1]);
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part, i += kWidth) {
        const F v = fused(gam, load_as<G>(item.grad.data, i), b * m[part]);
        const F z = fused(load_as<L>(item.latent.data, i), inv, offset);
        store_as<O>(plus, i, quantized(fused(sign, v, z)));
        if (BOTH)
          store_as<O>(minus, i, quantized(fused(F{} - eps, v, z)));
      }
    }
  }
}

using PerturbRun = void (*)(const Item &, const Perturbation &, const Keys &, const Run &);

template <Distribution D, bool BOTH> PerturbRun perturb_for(Dtype latent, Dtype grad, Dtype out) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16, int8 = Dtype::int8;
  const auto are = [&](Dtype l, Dtype g, Dtype o) { return latent == l && grad == g && out == o; };
  return are(f32, f32, f32)      ? perturb_run<D, f32, f32, f32, BOTH>
         : are(bf16, bf16, bf16) ? perturb_run<D, bf16, bf16, bf16, BOTH>
         : are(f16, f16, f16)    ? perturb_run<D, f16, f16, f16, BOTH>
         : are(f32, bf16, bf16)  ? perturb_run<D, f32, bf16, bf16, BOTH>
         : are(bf16, bf16, int8) ? perturb_run<D, bf16, bf16, int8, BOTH>
         : are(f32, f32, int8)   ? perturb_run<D, f32, f32, int8, BOTH>
                                 : nullptr;
}

template <bool BOTH> PerturbRun perturb_for(Distribution d, Dtype latent, Dtype grad, Dtype out) {
  switch (d) {
  case Distribution::uniform:
    return perturb_for<Distribution::uniform, BOTH>(latent, grad, out);
  case Distribution::rademacher:
    return perturb_for<Distribution::rademacher, BOTH>(latent, grad, out);
  case Distribution::triangular:
    return perturb_for<Distribution::triangular, BOTH>(latent, grad, out);
  case Distribution::logistic:
    return perturb_for<Distribution::logistic, BOTH>(latent, grad, out);
  default:
    return perturb_for<Distribution::gaussian, BOTH>(latent, grad, out);
  }
}

void perturb_fused(const Item &item, const Perturbation &p, int64_t begin, int64_t end) {
  const bool both = item.plus.data && item.minus.data;
  const Dtype out = item.plus.data ? item.plus.dtype : item.minus.dtype;
  const auto choose = both ? perturb_for<true> : perturb_for<false>;
  const PerturbRun run_of = choose(p.noise.distribution, item.latent.dtype, item.grad.dtype, out);
  if (!run_of)
    return perturb_range(item, p, begin, end);
  Names names = p.noise.names;
  names.tensor_id = item.tensor_id;
  const Keys keys = keys_of(names);
  for_each_run(
      item, p.r, begin, end, [&](const Run &run) { run_of(item, p, keys, run); },
      [&](int64_t first, int64_t last) { perturb_range(item, p, first, last); });
}

// ---- estimate

template <Distribution D, Dtype G, Dtype O>
void estimate_run(const Item &item, const Estimate &e, const Run &run, void *out, int64_t shift) {
  const F A = broadcast(e.A), inv = broadcast(run.scale.inv);
  Names names = e.noise.names;
  names.tensor_id = item.tensor_id;
  Keys keys = keys_of(names);
  uint64_t chunk = run.chunk;
  for (int64_t i = run.begin; i < run.end; i += kBlock, chunk += kGroup) {
    F acc[kVectors];
    prefetch<G, 1>(item.grad.data, i);
    for (int64_t direction = 0; direction < e.directions; ++direction) {
      H halves[kHalves];
      set_direction(keys, uint32_t(direction));
      philox_block(keys, chunk, halves);
      const F B = broadcast(e.B[direction] / kFactor<D>);
#pragma GCC unroll 1
      for (int h = 0; h < kHalves; ++h) {
        F low, high;
        noise_of<D>(halves[h], low, high);
        acc[2 * h] = direction ? fused(B, low, acc[2 * h]) : B * low;
        acc[2 * h + 1] = direction ? fused(B, high, acc[2 * h + 1]) : B * high;
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const int64_t at = i + k * kWidth;
      store_as<O>(out, at - shift, fused(A, load_as<G>(item.grad.data, at), inv * acc[k]));
    }
  }
}

using EstimateRun = void (*)(const Item &, const Estimate &, const Run &, void *, int64_t);

template <Distribution D> EstimateRun estimate_for(Dtype grad, Dtype out) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16;
  if (out == f32)
    return grad == f32    ? estimate_run<D, f32, f32>
           : grad == bf16 ? estimate_run<D, bf16, f32>
                          : estimate_run<D, f16, f32>;
  return out == bf16 ? estimate_run<D, bf16, bf16> : estimate_run<D, f16, f16>;
}

EstimateRun estimate_for(Distribution d, Dtype grad, Dtype out) {
  switch (d) {
  case Distribution::uniform:
    return estimate_for<Distribution::uniform>(grad, out);
  case Distribution::rademacher:
    return estimate_for<Distribution::rademacher>(grad, out);
  case Distribution::triangular:
    return estimate_for<Distribution::triangular>(grad, out);
  case Distribution::logistic:
    return estimate_for<Distribution::logistic>(grad, out);
  default:
    return estimate_for<Distribution::gaussian>(grad, out);
  }
}

void estimate_fused(const Item &item, const Estimate &e, int64_t begin, int64_t end) {
  const EstimateRun run_of = estimate_for(e.noise.distribution, item.grad.dtype, item.grad.dtype);
  for_each_run(
      item, e.r, begin, end, [&](const Run &run) { run_of(item, e, run, item.grad.data, 0); },
      [&](int64_t first, int64_t last) { estimate_range(item, e, first, last); });
}
