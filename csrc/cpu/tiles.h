// The CPU kernels, for the instruction set of the file that includes this one, which has defined in
// the namespace of its own: philox_halves(), kGroup, widen_half(), narrow_half(). A range is cut into
// tiles that stay in the first-level cache; the compiler turns the loops over a tile into vectors.
// No name of the standard library that the linker could share, see outside.h.

#if defined(__clang__)
#define FOGZO_LOOP _Pragma("clang loop vectorize(assume_safety)") for
#else
#define FOGZO_LOOP _Pragma("GCC ivdep") for // outputs are their own inputs or share nothing with them
#endif

constexpr int64_t kTile = 1024;
constexpr int kSums = 16; // partial sums of the norm, whatever the width of a vector

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The names of a tensor's noise.
inline Names names_in(const Noise &noise, const Item &item) {
  Names names = noise.names;
  names.tensor_id = item.tensor_id;
  return names;
}

constexpr int64_t size_of(Dtype t) { return t == Dtype::float32 ? 4 : t == Dtype::int8 ? 1 : 2; }

// A stream of loads alone is limited by their latency: the hardware's own prefetching stops at each page.
inline void prefetch_tile(const Span &span, int64_t begin) {
  const char *there = static_cast<const char *>(span.data) + begin * size_of(span.dtype);
  for (int64_t line = 0; line < kTile * size_of(span.dtype); line += 64)
    __builtin_prefetch(there + line);
}

// ---- dtypes

// A tile as float32: the tensor's own memory when it is float32, else `buffer`.
const float *load(const Span &span, int64_t begin, int64_t count, float *buffer) {
  if (span.dtype == Dtype::float32)
    return static_cast<const float *>(span.data) + begin;
  const uint16_t *in = static_cast<const uint16_t *>(span.data) + begin;
  if (span.dtype == Dtype::float16)
    widen_half(in, count, buffer);
  else
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) buffer[i] = float_of(uint32_t(in[i]) << 16);
  return buffer;
}

// bfloat16, to nearest even; NaN stays NaN
inline uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Where to write a tile: the tensor's own memory when it is float32, else `buffer`, to be stored.
float *target(const Span &span, int64_t begin, float *buffer) {
  return span.dtype == Dtype::float32 ? static_cast<float *>(span.data) + begin : buffer;
}

void store(const float *in, const Span &span, int64_t begin, int64_t count) {
  if (span.dtype == Dtype::float32) {
    float *out = static_cast<float *>(span.data) + begin;
    if (out != in)
      std::memcpy(out, in, count * sizeof(float));
  } else if (span.dtype == Dtype::int8) {
    int8_t *out = static_cast<int8_t *>(span.data) + begin;
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) out[i] = int8_t(int32_t(in[i]));
  } else {
    uint16_t *out = static_cast<uint16_t *>(span.data) + begin;
    if (span.dtype == Dtype::float16)
      narrow_half(in, count, out);
    else
      FOGZO_LOOP(int64_t i = 0; i < count; ++i) out[i] = narrow_bfloat16(in[i]);
  }
}

// A buffer that holds a tile, as a kernel takes it that counts elements from the tensor's first.
inline Span tile_span(const float *buffer, int64_t start) {
  return {reinterpret_cast<void *>(uintptr_t(buffer) - uintptr_t(start) * sizeof(float)), Dtype::float32};
}

// ---- noise

// m of the consecutive elements e .. e + count - 1, count <= kTile
template <Distribution D> void noise_run(const Names &names, uint64_t e, int64_t count, float *m) {
  uint16_t halves[kTile + 8 * kGroup + 8];
  const int64_t shift = int64_t(e & 7);
  philox_halves(names, e >> 3, (shift + count + 7) / 8, halves);
  if constexpr (drawn_from<D>() == DrawnFrom::half) {
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) m[i] = noise_of_half<D>(halves[shift + i]);
  } else {
    float pairs[kTile + 8 * kGroup + 8]; // a word's pair may straddle the end of the run
    float *out = shift == 0 && count % 2 == 0 ? m : pairs;
    const int64_t words = (shift + count + 1) / 2;
    FOGZO_LOOP(int64_t w = 0; w < words; ++w) {
      const Pair pair = noise_of_word<D>(halves[2 * w], halves[2 * w + 1]);
      out[2 * w] = pair.even;
      out[2 * w + 1] = pair.odd;
    }
    if (out != m)
      std::memcpy(m, pairs + shift, count * sizeof(float));
  }
}

void noise_run(const Noise &noise, uint64_t e, int64_t count, float *m) {
  switch (noise.distribution) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Distribution::name:                                                                                     \
    return noise_run<Distribution::name>(noise.names, e, count, m);
    FOGZO_DISTRIBUTIONS(FOGZO_CASE)
#undef FOGZO_CASE
  }
}

// m of local elements begin .. begin + count - 1 of a shard
void noise_tile(const Noise &noise, const Layout &layout, int64_t begin, int64_t count, float *m) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (begin + done) / layout.inner, column = (begin + done) % layout.inner;
    const int64_t run = least(count - done, layout.inner - column);
    noise_run(noise, uint64_t(layout.offset + row * layout.stride + column), run, m + done);
    done += run;
  }
}

// ---- tiles

// body(first, last, scale) for each part of a tile that shares one alpha; indices within the tile
template <class Body> void for_each_scale(const Item &item, float r, int64_t begin, int64_t count, Body body) {
  for (int64_t done = 0; done < count;) {
    const int64_t group = (begin + done) / item.scale_length;
    const int64_t last = least(count, (group + 1) * item.scale_length - begin);
    body(done, last, make_scale(item.alpha[group], r));
    done = last;
  }
}

template <class Body> void for_each_tile(int64_t begin, int64_t end, Body body) {
  for (int64_t start = begin; start < end; start += kTile)
    body(start, least(kTile, end - start));
}

void noise_range(const Noise &noise, const Layout &layout, float scale, float *out, int64_t begin,
                 int64_t end) {
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    noise_tile(noise, layout, start, count, out + start);
    FOGZO_LOOP(int64_t i = start; i < start + count; ++i) out[i] *= scale;
  });
}

// ---- guide norm

// Element i of a tile goes to sum i % kSums, so that the order of additions is the same everywhere.
double sumsq_range(const Item &item, float r, int64_t begin, int64_t end) {
  float buffer[kTile];
  double sums[kSums] = {};
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *g = load(item.grad, start, count, buffer);
    prefetch_tile(item.grad, start + kTile);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      const double delta = scale.delta;
      int64_t i = first;
      const auto add = [&](int64_t at) {
        const double h = double(g[at]) * delta;
        sums[at % kSums] += h * h;
      };
      for (; i < last && i % kSums; ++i)
        add(i);
      for (; i + kSums <= last; i += kSums)
        for (int l = 0; l < kSums; ++l) {
          const double h = double(g[i + l]) * delta;
          sums[l] += h * h;
        }
      for (; i < last; ++i)
        add(i);
    });
  });
  double total = 0;
  for (double sum : sums)
    total += sum;
  return total;
}

// ---- perturb and quantize

void perturb_range(const Item &item, const Perturbation &p, int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], m[kTile], out[kTile];
  const GridRange grid = p.grid; // copies of constants: a store could change what lies in memory
  const float a = p.a, b = p.b, r = p.r;
  const Noise noise{p.noise.distribution, names_in(p.noise, item)};
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent), *g = load(item.grad, start, count, grad);
    noise_tile(noise, item.layout, start, count, m);
    const auto write = [&](const Span &span, float epsilon) {
      if (!span.data)
        return;
      float *to = target(span, start, out);
      const bool codes = span.dtype == Dtype::int8; // these hold the code itself
      for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
        const float gam = a * scale.delta;
        const auto code = [&](int64_t i) {
          const float v = direction_of(gam, g[i], b, m[i]);
          return code_of(std::fma(epsilon, v, position_of(t[i], scale, grid)), grid);
        };
        if (codes)
          FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = code(i);
        else
          FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = value_of(code(i), scale, grid);
      });
      store(to, span, start, count);
    };
    write(item.plus, p.epsilon);
    write(item.minus, -p.epsilon);
  });
}

// ---- estimate

// G of a tile into out
void estimate_tile(const Item &item, const Estimate &e, const float *g, int64_t start, int64_t count,
                   float *out) {
  float m[kTile], acc[kTile];
  const float A = e.A;
  Noise noise{e.noise.distribution, names_in(e.noise, item)};
  for (int64_t direction = 0; direction < e.directions; ++direction) {
    noise.names.direction = uint32_t(direction);
    noise_tile(noise, item.layout, start, count, m);
    const float B = e.B[direction];
    if (direction == 0)
      FOGZO_LOOP(int64_t i = 0; i < count; ++i) acc[i] = B * m[i];
    else
      FOGZO_LOOP(int64_t i = 0; i < count; ++i) acc[i] = std::fma(B, m[i], acc[i]);
  }
  for_each_scale(item, e.r, start, count, [&](int64_t first, int64_t last, Scale scale) {
    FOGZO_LOOP(int64_t i = first; i < last; ++i) out[i] = estimate_of(A, g[i], scale.inv, acc[i]);
  });
}

void estimate_range(const Item &item, const Estimate &e, int64_t begin, int64_t end) {
  float grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    float *to = target(item.grad, start, out);
    estimate_tile(item, e, load(item.grad, start, count, grad), start, count, to);
    store(to, item.grad, start, count);
  });
}

// ---- the fused tail

// the optimizer's step of a tile, in place
template <Rule R>
void step_tile(const Item &item, Update update, const float *G, int64_t start, int64_t count) {
  float buffer[kTile], out[kTile], none[kTile];
  const Span &weight = item.master.data ? item.master : item.latent;
  const float *theta = load(weight, start, count, buffer);
  float *to = target(weight, start, out);
  float *first = states_of(R) > 0 ? static_cast<float *>(item.first.data) + start : none;
  float *second = states_of(R) > 1 ? static_cast<float *>(item.second.data) + start : none;
  float unused = 0;
  if constexpr (states_of(R) == 2) {
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = updated<R>(update, theta[i], G[i], first[i], second[i]);
  } else if constexpr (states_of(R) == 1) {
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = updated<R>(update, theta[i], G[i], first[i], unused);
  } else {
    static_assert(states_of(R) == 0, "a rule has at most two states");
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) to[i] = updated<R>(update, theta[i], G[i], unused, unused);
  }
  store(to, weight, start, count);
  if (item.master.data)
    store(to, item.latent, start, count);
}

void step_tile(const Item &item, Update update, const float *G, int64_t start, int64_t count) {
  switch (update.rule) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Rule::name:                                                                                             \
    return step_tile<Rule::name>(item, update, G, start, count);
    FOGZO_RULES(FOGZO_CASE)
#undef FOGZO_CASE
  }
}

void quantize_range(const Item &item, GridRange grid, float r, int64_t begin,
                    int64_t end); // by these or vectors

void quantize_loops(const Item &item, GridRange grid, float r, int64_t begin, int64_t end) {
  float latent[kTile], out[kTile];
  const bool codes = item.plus.dtype == Dtype::int8;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent);
    float *to = target(item.plus, start, out);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      const auto code = [&](int64_t i) { return code_of(position_of(t[i], scale, grid), grid); };
      if (codes)
        FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = code(i);
      else
        FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = value_of(code(i), scale, grid);
    });
    store(to, item.plus, start, count);
  });
}

// estimate(start, count, out) writes G of a tile
template <class EstimateTile>
void update_by(const Item &item, const Tail &tail, int64_t begin, int64_t end, EstimateTile estimate) {
  float out[kTile];
  const bool drawn = item.alpha && tail.estimate.directions;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    if (!tail.skip) {
      if (drawn)
        estimate(start, count, out);
      step_tile(item, tail.update, drawn ? out : load(item.grad, start, count, out), start, count);
    }
    if (item.plus.data) // while the tile is in the cache
      quantize_range(item, tail.grid, tail.estimate.r, start, start + count);
  });
}

void update_range(const Item &item, const Tail &tail, int64_t begin, int64_t end) {
  update_by(item, tail, begin, end, [&](int64_t start, int64_t count, float *out) {
    float grad[kTile];
    estimate_tile(item, tail.estimate, load(item.grad, start, count, grad), start, count, out);
  });
}

// ---- straight-through derivative

template <StraightThrough S>
void straight_through_range(const Item &item, GridRange grid, float r, int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent), *g = load(item.grad, start, count, grad);
    float *to = target(item.plus, start, out);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      FOGZO_LOOP(int64_t i = first; i < last; ++i) to[i] = g[i] * derivative_of<S>(t[i], scale, grid, r);
    });
    store(to, item.plus, start, count);
  });
}

void straight_through_range(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin,
                            int64_t end) {
  switch (kind) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case StraightThrough::name:                                                                                  \
    return straight_through_range<StraightThrough::name>(item, grid, r, begin, end);
    FOGZO_STRAIGHT_THROUGHS(FOGZO_CASE)
#undef FOGZO_CASE
  }
}

void measure_range(const Item &item, const Measure &measure, int64_t begin, int64_t end); // in cells.h
double total_range(const Item &item, Statistic statistic, int64_t begin, int64_t end);
