// Learned scales in registers, 2 kWidth elements at a time as in fused.h: the straight-through forms that are
// 1 or 0. What is left of a part of a tile goes through the loops of learned.h.

// Sums of terms, those of sum_of(): element i goes to number i % kSums.
template <bool PAIRS> struct VectorSums {
  static constexpr int kCount = 2 * kSums / kWidth; // vectors of doubles
  D lanes[kCount] = {};

  // the halves of two vectors, one after the other
  void add(F first, F last) {
    constexpr int step[] = {0, 1 * kCount / 4, 2 * kCount / 4, 3 * kCount / 4};
    lanes[PAIRS ? step[0] : 0] += low_doubles(first);
    lanes[PAIRS ? step[1] : 1] += high_doubles(first);
    lanes[PAIRS ? step[2] : 2 % kCount] += low_doubles(last);
    lanes[PAIRS ? step[3] : 3 % kCount] += high_doubles(last);
  }
  void store(double (&sums)[kSums]) const {
    double in_order[kSums];
    std::memcpy(in_order, lanes, sizeof in_order);
    for (int i = 0; i < kSums; ++i) // in pairs the even ones come first
      sums[i] = in_order[PAIRS ? i % 2 * (kSums / 2) + i / 2 : i];
  }
};

template <StraightThrough S, Dtype T> struct LearnedVectors : Learned {
  static constexpr bool PAIRS = in_pairs<T>(T);
  static constexpr int kStep = 2 * kWidth;

  F ones(F z, F low, F high) const { // h'
    if constexpr (S == StraightThrough::identity)
      return broadcast(1.0f);
    else if constexpr (S == StraightThrough::identity_trust)
      return one_from_to(z, low - 0.5f, high + 0.5f);
    else
      return one_between(z, low, high);
  }

  void open(int64_t, int64_t) {}
  void close(int64_t, int64_t) {}

  double part(int64_t start, int64_t first, int64_t last, Scale scale) const {
    const F inv = broadcast(scale.inv), offset = broadcast(-grid.offset), low = broadcast(grid.qmin),
            high = broadcast(grid.qmax), R = broadcast(r), shift = broadcast(r * grid.offset);
    VectorSums<PAIRS> vector_sums;
    const auto two = [&](F t, F &g) { // the terms; g h' in the place of g
      const F z = fused(t, inv, offset), clamped = smaller(larger(z, low), high);
      const F between = r == 1.0f ? where_equal(z, clamped, F{} - z, shift) : shift;
      const F term = g * fused(R, rounded(clamped), between);
      g = g * ones(z, low, high);
      return term;
    };
    int64_t i = start + first;
    for (; i + kStep <= start + last; i += kStep) {
      F t0, t1, g0, g1;
      load_two<T, PAIRS>(item.latent.data, i, t0, t1);
      load_two<T, PAIRS>(item.grad.data, i, g0, g1);
      const F term0 = two(t0, g0), term1 = two(t1, g1);
      vector_sums.add(term0, term1);
      store_two<T, PAIRS, Narrow::exact>(item.plus.data, i, g0, g1); // g, 0 or NaN
    }
    double sums[kSums];
    vector_sums.store(sums);
    return rest(sums, i > start + first, i, start + last, scale);
  }

  double rest(double (&sums)[kSums], bool begun, int64_t begin, int64_t end, const Scale &scale) const {
    const int64_t count = end - begin;
    float latent[kStep], grad[kStep], terms[kStep], out[kStep];
    const float *t = load(item.latent, begin, count, latent), *g = load(item.grad, begin, count, grad);
    for (int64_t j = 0; j < count; ++j) {
      terms[j] = g[j] * alpha_slope_of(t[j], scale, grid, r);
      out[j] = g[j] * derivative_of<S>(t[j], scale, grid, r);
    }
    store(out, item.plus, begin, count);
    return sum_of(sums, begun, terms, count);
  }
};

// The same of operands that are not as they lie in memory: rotated, or of several dtypes.
template <StraightThrough S> struct LearnedBufferVectors : LearnedBuffers {
  double part(int64_t start, int64_t first, int64_t last, Scale scale) const {
    Item tile = item;
    tile.latent = tile_span(t, start);
    tile.grad = tile_span(g, start);
    tile.plus = tile_span(to, start);
    return LearnedVectors<S, Dtype::float32>{{tile, grid, r}}.part(start, first, last, scale);
  }
};

template <StraightThrough S> Cut learned_vectors(const Learned &learned, int64_t begin, int64_t end) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16;
  const Item &item = learned.item;
  const auto all = [&](Dtype one) {
    return !item.block && item.latent.dtype == one && item.grad.dtype == one && item.plus.dtype == one;
  };
  if (all(f32)) {
    LearnedVectors<S, f32> tile{learned};
    return learned_by(tile, begin, end);
  }
  if (all(bf16)) {
    LearnedVectors<S, bf16> tile{learned};
    return learned_by(tile, begin, end);
  }
  LearnedBufferVectors<S> tile{{learned}};
  return learned_by(tile, begin, end);
}

Cut learned_fused(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin, int64_t end) {
  const Learned learned{item, grid, r};
  if (kind == StraightThrough::identity)
    return learned_vectors<StraightThrough::identity>(learned, begin, end);
  if (kind == StraightThrough::identity_clipped)
    return learned_vectors<StraightThrough::identity_clipped>(learned, begin, end);
  if (kind == StraightThrough::identity_trust)
    return learned_vectors<StraightThrough::identity_trust>(learned, begin, end);
  return learned_range(item, kind, grid, r, begin, end);
}
