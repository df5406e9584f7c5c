// Learned scales: g h'(theta), and the gradients of alphas. Like tiles.h; tiles.h and hadamard.h come before
// it.

// Sum of a few thousand floats. Element i goes to sum i % kSums, so that the order is the same everywhere, and
// those that do not fill the sums come last. Some may be in `sums` already, as `begun` tells.
double sum_of(double (&sums)[kSums], bool begun, const float *terms, int64_t count) {
  double total = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int l = 0; l < kSums; ++l)
      sums[l] += double(terms[i + l]);
  if (i || begun)
    for (double sum : sums)
      total += sum;
  for (; i < count; ++i)
    total += double(terms[i]);
  return total;
}

// What a kernel knows of its operands.
struct Learned {
  const Item &item;
  GridRange grid;
  float r;
};

// A tile's operands as float32, the latents rotated where the quantizer has a transform.
struct LearnedBuffers : Learned {
  float latent[kTile], grad[kTile], out[kTile];
  const float *t, *g;
  float *to;

  void open(int64_t start, int64_t count) {
    t = load(item.latent, start, count, latent);
    if (item.block) {
      rotate(t, latent, count, item.block);
      t = latent;
    }
    g = load(item.grad, start, count, grad);
    to = target(item.plus, start, out);
  }
  void close(int64_t start, int64_t count) {
    if (item.block)
      rotate(to, to, count, item.block);
    store(to, item.plus, start, count);
  }
};

// By the compiler's vectors.
template <StraightThrough S> struct LearnedLoops : LearnedBuffers {
  float terms[kTile];

  // Writes g h' of a part of the tile that shares an alpha, and returns what its terms come to. Two loops: both
  // in one are no vectors on every instruction set.
  double part(int64_t, int64_t first, int64_t last, Scale scale) {
    const float *const theta = t, *const gradient = g, R = r;
    float *const slopes = terms, *const outputs = to;
    const GridRange range = grid;
    FOGZO_LOOP(int64_t i = first; i < last; ++i)
    slopes[i] = gradient[i] * alpha_slope_of(theta[i], scale, range, R);
    FOGZO_LOOP(int64_t i = first; i < last; ++i)
    outputs[i] = gradient[i] * derivative_of<S>(theta[i], scale, range, R);
    double sums[kSums] = {};
    return sum_of(sums, false, terms + first, last - first);
  }
};

template <class Tile> Cut learned_by(Tile &tile, int64_t begin, int64_t end) {
  const Item &item = tile.item;
  Cut cut;
  double sum = 0; // of the alpha at hand, so far
  const int64_t length = item.scale_length;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    tile.open(start, count);
    for_each_scale(item, tile.r, start, count, [&](int64_t first, int64_t last, Scale scale) {
      sum += tile.part(start, first, last, scale);
      const int64_t index = (start + first) / length, from = index * length;
      if (start + last < from + length) // it goes on
        return;
      if (from < begin)
        cut.before = sum;
      else
        item.alpha_grad[index] = float(item.factor * sum);
      sum = 0;
    });
    tile.close(start, count);
  });
  if (end % length) // the last one goes on
    (end / length * length < begin ? cut.before : cut.behind) = sum;
  return cut;
}

template <StraightThrough S> Cut learned_loops(const Learned &learned, int64_t begin, int64_t end) {
  LearnedLoops<S> tile{{learned}};
  return learned_by(tile, begin, end);
}

Cut learned_range(const Item &item, StraightThrough kind, GridRange grid, float r, int64_t begin, int64_t end) {
  switch (kind) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case StraightThrough::name:                                                                                  \
    return learned_loops<StraightThrough::name>({item, grid, r}, begin, end);
    FOGZO_STRAIGHT_THROUGHS(FOGZO_CASE)
#undef FOGZO_CASE
  }
  __builtin_trap(); // no value of the enumeration
}
