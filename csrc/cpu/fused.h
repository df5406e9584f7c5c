// The fused paths, perturbation here: noise, mixing and rounding in registers, a few hundred elements at a time
// (vectors.h); the tiles of tiles.h do what has no fused path. A block has one scale and one run of Philox
// calls (a Run of them), or a scale and a number for each of its chunks of 8 elements (a Piece): rows, groups
// and shards whose lengths are multiples of 8. What does not fill a block goes through buffers of its size.

inline void *at(void *data, Dtype dtype, int64_t i) { return static_cast<char *>(data) + i * size_of(dtype); }

constexpr int64_t kAhead = 4096; // bytes; the hardware's own prefetching stops at each page

// Two vectors, kAhead bytes after element i.
template <Dtype T, int WRITE> inline void prefetch(const void *data, int64_t i) {
  const char *there = static_cast<const char *>(data) + i * size_of(T) + kAhead;
  for (int64_t line = 0; line < 2 * kWidth * size_of(T); line += 64)
    __builtin_prefetch(there + line, WRITE);
}

// A block.
template <Dtype T, int WRITE> inline void prefetch_block(const void *data, int64_t i) {
  for (int64_t j = i; j < i + kVectorBlock; j += 2 * kWidth)
    prefetch<T, WRITE>(data, j);
}

struct Run {
  int64_t begin, end; // local elements: whole blocks
  uint64_t chunk;     // of the first one; the upper half of all of them
  Scale scale;

  uint64_t chunk_at(int64_t i) const { return chunk + uint64_t(i - begin) / 8; }
};

inline int64_t drawn_at(const Run &run, int64_t i) { return least(kDrawn, (run.end - i) / (2 * kWidth)); }

struct Piece {
  int64_t begin, end; // local elements of one block, whose first `skip` elements lie before them
  int64_t skip;
  uint64_t chunk[kGroup];
  float delta[kGroup];
};

// Walks over the elements of a range, with what their names and scales are.
struct Walk {
  const Item &item;
  float r;
  int64_t at, column, e, group, left; // e: of element `at`; left: elements up to the group's end

  Walk(const Item &item, float r, int64_t begin)
      : item(item), r(r), at(begin), column(begin % item.layout.inner),
        e(item.layout.offset + begin / item.layout.inner * item.layout.stride + column),
        group(begin / item.scale_length), left(item.scale_length - begin % item.scale_length) {}

  int64_t row_end() const { return at + item.layout.inner - column; }
  float delta() const { return item.alpha[group] * r; }

  // by a count that leads at most to the end of the row and of the group
  void advance(int64_t count) {
    at += count, column += count, e += count, left -= count;
    if (column == item.layout.inner) {
      column = 0;
      e += item.layout.stride - item.layout.inner;
    }
    if (left == 0) {
      ++group;
      left = item.scale_length;
    }
  }
};

inline bool in_chunks(const Item &item) {
  const Layout &l = item.layout;
  return l.offset % 8 == 0 && (l.inner >= item.numel || (l.inner % 8 == 0 && l.stride % 8 == 0)) &&
         (item.scale_length >= item.numel || item.scale_length % 8 == 0);
}

// The block at the walk, up to `stop`, by chunks.
inline Piece piece_of_chunks(Walk &walk, int64_t stop) {
  Piece piece;
  piece.begin = walk.at, piece.end = stop, piece.skip = 0;
  int i = 0;
  while (walk.at < stop) {
    const int64_t count = least(least(stop, walk.row_end()), walk.at + walk.left) - walk.at;
    const uint64_t chunk = uint64_t(walk.e) >> 3;
    const float delta = walk.delta();
    for (int k = 0; k < int((count + 7) / 8); ++k, ++i) {
      piece.chunk[i] = chunk + uint64_t(k);
      piece.delta[i] = delta;
    }
    walk.advance(count);
  }
  for (; i < kGroup; ++i)
    piece.chunk[i] = 0, piece.delta[i] = 1.0f; // of elements that are not there
  return piece;
}

// A part of a block with one scale and consecutive names, wherever it begins.
inline Piece piece_of_part(Walk &walk, int64_t stop) {
  Piece piece;
  piece.begin = walk.at, piece.end = stop, piece.skip = walk.e & 7;
  const float delta = walk.delta();
  for (int i = 0; i < kGroup; ++i) {
    piece.chunk[i] = (uint64_t(walk.e) >> 3) + uint64_t(i);
    piece.delta[i] = delta;
  }
  walk.advance(stop - walk.at);
  return piece;
}

// Cuts a range into runs for `fast` and pieces of at most a block for `mixed`.
template <class Fast, class Mixed>
void for_each_run(const Item &item, float r, int64_t begin, int64_t end, Fast fast, Mixed mixed) {
  const bool chunked = in_chunks(item);
  for (Walk walk(item, r, begin); walk.at < end;) {
    const int64_t same = least(least(end, walk.row_end()), walk.at + walk.left), skip = walk.e & 7;
    const int64_t to_next_half = (int64_t(1) << 35) - walk.e % (int64_t(1) << 35); // of the chunk's number
    const int64_t whole = skip ? 0 : least(same - walk.at, to_next_half) / kVectorBlock * kVectorBlock;
    if (whole) {
      fast(Run{walk.at, walk.at + whole, uint64_t(walk.e) >> 3, make_scale(item.alpha[walk.group], r)});
      walk.advance(whole);
    } else if (chunked) {
      mixed(piece_of_chunks(walk, least(end, walk.at + kVectorBlock)));
    } else {
      mixed(piece_of_part(walk, least(same, walk.at + kVectorBlock - skip)));
    }
  }
}

// Whether pieces would be so short that tiles are faster.
inline bool better_by_tiles(const Item &item) {
  return !in_chunks(item) && least(item.layout.inner, item.scale_length) < kVectorBlock / 4;
}

// Room for a block of an operand, at the place that it has in the block.
template <Dtype T> struct Buffer {
  alignas(64) char bytes[kVectorBlock * size_of(T)] = {};

  void *read(const void *data, const Piece &piece) {
    std::memcpy(bytes + piece.skip * size_of(T), static_cast<const char *>(data) + piece.begin * size_of(T),
                (piece.end - piece.begin) * size_of(T));
    return bytes;
  }
  void write(void *data, const Piece &piece) const {
    std::memcpy(static_cast<char *>(data) + piece.begin * size_of(T), bytes + piece.skip * size_of(T),
                (piece.end - piece.begin) * size_of(T));
  }
};

inline bool fills_a_block(const Piece &piece) { return piece.end - piece.begin == kVectorBlock; }

template <Dtype... T> constexpr bool in_pairs(Dtype out) {
  return ((T == Dtype::bfloat16) && ...) && (out == Dtype::bfloat16 || out == Dtype::int8);
}

// ---- perturb and quantize

struct Outputs {
  void *plus, *minus; // both, or one that is called plus
  float epsilon;      // of plus
};

struct Scales { // of the elements of one vector
  F inv, gam, delta, shift;
  F table; // of TABLE: Q of every code, as it is stored
};

inline bool fit_a_table(const GridRange &grid) { return grid.qmax - grid.qmin < float(kWidth); }

// The low bits of a code are its place: code = place - kWidth k, qmin <= code < qmin + kWidth.
inline F codes_by_place(F qmin) {
  alignas(64) static constexpr float places[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(sizeof places / sizeof *places >= kWidth, "a number for each place");
  constexpr float half =
      0.5f * (kWidth - 1) / kWidth; // k and a fraction of 0 .. 2 half: without half that is k
  const F place = load_floats(places),
          k = rounded(fused(place - qmin, broadcast(1.0f / kWidth), broadcast(-half)));
  return fused(k, broadcast(-float(kWidth)), place);
}

// Of TABLE: Q of the codes, as they are stored; there is one for each run, which may be short.
template <Dtype O> inline F table_of_values(F codes, F delta, F shift) {
  const F values = fused(codes, delta, shift); // the bits of delta * (code + offset)
  return O == Dtype::bfloat16 ? float_of(narrowed<Narrow::finite>(values) & 0xFFFF0000u) : values;
}

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH, bool TABLE> struct Perturb {
  static constexpr bool PAIRS = in_pairs<L, G>(O);
  F a, b, eps, qmin, qmax, grid_offset;

  Perturb(const Perturbation &p, float epsilon)
      : a(broadcast(p.a)), b(broadcast(p.b / Drawn<D>::factor)), eps(broadcast(epsilon)),
        qmin(broadcast(p.grid.qmin)), qmax(broadcast(p.grid.qmax)), grid_offset(broadcast(p.grid.offset)) {}

  Scales scales(F delta, F inv) const { return {inv, a * delta, delta, delta * grid_offset, F{}}; }

  F quantized(F y, const Scales &s) const {
    const F clamped = smaller(larger(y, qmin), qmax);
    if (TABLE) // the sum's low bits are the code, half to even
      return pick(s.table, bits_of(clamped + 12582912.0f));
    const F code = rounded(clamped);
    return O == Dtype::int8 ? code : fused(code, s.delta, s.shift); // the bits of delta * (code + offset)
  }

  // 2 kWidth elements from element i of each operand, the vectors with noise m0 and m1, scales s0 and s1
  inline __attribute__((always_inline)) void two(F m0, F m1, const void *latent, const void *grad,
                                                 const Outputs &out, int64_t i, const Scales &s0,
                                                 const Scales &s1) const {
    F g0, g1, t0, t1;
    load_two<G, PAIRS>(grad, i, g0, g1);
    load_two<L, PAIRS>(latent, i, t0, t1);
    const F v0 = fused(s0.gam, g0, b * m0), v1 = fused(s1.gam, g1, b * m1);
    const F z0 = fused(t0, s0.inv, F{} - grid_offset), z1 = fused(t1, s1.inv, F{} - grid_offset);
    const auto store = [&](void *to, F signed_eps) {
      store_two<O, PAIRS, TABLE ? Narrow::exact : Narrow::finite>(
          to, i, quantized(fused(signed_eps, v0, z0), s0), quantized(fused(signed_eps, v1, z1), s1));
    };
    store(out.plus, eps);
    if (BOTH)
      store(out.minus, F{} - eps);
  }
};

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH, bool TABLE>
void perturb_run(const Item &item, const Perturbation &p, const Stream &stream, const Outputs &out,
                 const Run &run) {
  const Perturb<D, L, G, O, BOTH, TABLE> kernel(p, out.epsilon);
  Scales scales = kernel.scales(broadcast(run.scale.delta), broadcast(run.scale.inv));
  if (TABLE)
    scales.table = table_of_values<O>(codes_by_place(kernel.qmin), scales.delta, scales.shift);
  const void *const latent = item.latent.data, *const grad = item.grad.data;
  const Outputs to = out;
  constexpr bool fetched = kFetchedWhileDrawn && L == Dtype::float32 && G == Dtype::float32;
  RunNoise<D, kernel.PAIRS> noise;
  for (int64_t i = run.begin; i < run.end;) {
    const int64_t count = drawn_at(run, i);
    Operands operands;
    if (fetched)
      operands = {static_cast<const float *>(latent) + i, static_cast<const float *>(grad) + i};
    noise.draw(stream, run.chunk_at(i), count, operands);
    // nothing is prefetched for later: of so many streams, what is fetched early delays what is due
#pragma GCC unroll 1
    for (int64_t h = 0; h < count; ++h, i += 2 * kWidth) {
      F m0, m1;
      noise.get(h, m0, m1);
      kernel.two(m0, m1, latent, grad, to, i, scales, scales);
    }
  }
}

template <Distribution D, Dtype L, Dtype G, Dtype O, bool BOTH>
void perturb_piece(const Item &item, const Perturbation &p, const Keys &keys, const Outputs &out,
                   const Piece &piece) {
  const Perturb<D, L, G, O, BOTH, false> kernel(p, out.epsilon);
  constexpr bool PAIRS = kernel.PAIRS;
  H halves[kHalves];
  philox_block<PAIRS>(keys, load_chunks<PAIRS>(piece.chunk), halves);
  const F delta = load_floats(piece.delta), inv = broadcast(1.0f) / delta;
  const auto block = [&](const void *latent, const void *grad, const Outputs &to) {
    for (int h = 0; h < kHalves; ++h) {
      const Scales s0 = kernel.scales(spread<PAIRS>(delta, 2 * h), spread<PAIRS>(inv, 2 * h));
      const Scales s1 =
          PAIRS ? s0 : kernel.scales(spread<PAIRS>(delta, 2 * h + 1), spread<PAIRS>(inv, 2 * h + 1));
      F m0, m1;
      noise_of<D, PAIRS>(halves[h], m0, m1);
      kernel.two(m0, m1, latent, grad, to, 2 * kWidth * h, s0, s1);
    }
  };
  const int64_t i = piece.begin;
  if (fills_a_block(piece)) {
    prefetch_block<L, 0>(item.latent.data, i);
    prefetch_block<G, 0>(item.grad.data, i);
    prefetch_block<O, 1>(out.plus, i);
    if (BOTH)
      prefetch_block<O, 1>(out.minus, i);
    return block(at(item.latent.data, L, i), at(item.grad.data, G, i),
                 {at(out.plus, O, i), BOTH ? at(out.minus, O, i) : nullptr, out.epsilon});
  }
  Buffer<L> latents;
  Buffer<G> grads;
  Buffer<O> plus, minus;
  block(latents.read(item.latent.data, piece), grads.read(item.grad.data, piece),
        {plus.bytes, minus.bytes, out.epsilon});
  plus.write(out.plus, piece);
  if (BOTH)
    minus.write(out.minus, piece);
}

struct PerturbKernels {
  void (*run)(const Item &, const Perturbation &, const Stream &, const Outputs &, const Run &) = nullptr;
  void (*piece)(const Item &, const Perturbation &, const Keys &, const Outputs &, const Piece &) = nullptr;
};

template <Distribution D, bool BOTH>
PerturbKernels perturb_for(Dtype latent, Dtype grad, Dtype out, bool table) {
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16, int8 = Dtype::int8;
#define FOGZO_CASE(L, G, O)                                                                                    \
  if (latent == L && grad == G && out == O)                                                                    \
    return {table && O != int8 ? perturb_run<D, L, G, O, BOTH, O != int8>                                      \
                               : perturb_run<D, L, G, O, BOTH, false>,                                         \
            perturb_piece<D, L, G, O, BOTH>};
  FOGZO_CASE(f32, f32, f32)
  FOGZO_CASE(bf16, bf16, bf16)
  FOGZO_CASE(f16, f16, f16)
  FOGZO_CASE(f32, bf16, bf16)
  FOGZO_CASE(f32, f32, bf16)
  FOGZO_CASE(bf16, bf16, int8)
  FOGZO_CASE(f32, f32, int8)
#undef FOGZO_CASE
  return {};
}

template <bool BOTH>
PerturbKernels perturb_for(Distribution d, Dtype latent, Dtype grad, Dtype out, bool table) {
  switch (d) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Distribution::name:                                                                                     \
    return perturb_for<Distribution::name, BOTH>(latent, grad, out, table);
    FOGZO_DISTRIBUTIONS(FOGZO_CASE)
#undef FOGZO_CASE
  }
  __builtin_trap(); // no value of the enumeration
}

void perturb_fused(const Item &item, const Perturbation &p, int64_t begin, int64_t end) {
  const bool both = item.plus.data && item.minus.data;
  const Span &first = item.plus.data ? item.plus : item.minus;
  const auto choose = both ? perturb_for<true> : perturb_for<false>;
  const PerturbKernels kernels =
      choose(p.noise.distribution, item.latent.dtype, item.grad.dtype, first.dtype, fit_a_table(p.grid));
  if (!kernels.run || better_by_tiles(item))
    return perturb_range(item, p, begin, end);
  const Outputs out{first.data, item.minus.data, item.plus.data ? p.epsilon : -p.epsilon};
  Stream stream(names_in(p.noise, item));
  for_each_run(
      item, p.r, begin, end,
      [&](const Run &run) {
        stream.turn_to(run.chunk, p.noise.names.direction);
        kernels.run(item, p, stream, out, run);
      },
      [&](const Piece &piece) { kernels.piece(item, p, stream.keys, out, piece); });
}
