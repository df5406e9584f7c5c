// What the vector paths share: noise, loads and stores of two vectors at a time. The file that includes
// this one has defined vectors of kWidth floats F, halves H, bits U, and their operations.
//
// Two vectors hold 2 kWidth neighbouring elements, in one of two orders. In order: the first kWidth, then
// the others. In pairs, for 16-bit operands: the even ones, then the odd ones, as they lie in words of two,
// so that neither noise nor operands are shuffled.

constexpr int kVectors = 8 * kGroup / kWidth; // F per block
constexpr int kHalves = kVectors / 2;
constexpr int64_t kVectorBlock = 8 * kGroup; // elements per block
static_assert(kGroup == kWidth, "a vector holds one value for each chunk of a block");

// ---- Philox

constexpr int kParts = 2;                   // vectors of calls in a block
constexpr int64_t kCalls = kGroup / kParts; // of a vector

// the rounds from round FROM on, of COUNT vectors: a round is a chain of slow instructions
template <int FROM, int COUNT>
inline __attribute__((always_inline)) void philox_rounds(const Keys &keys, Lanes *w) {
#pragma GCC unroll 10
  for (int round = FROM; round < kPhiloxRounds; ++round)
#pragma GCC unroll 4
    for (int u = 0; u < COUNT; ++u) {
      const auto p0 = product(w[u].x0, kPhiloxM0), p1 = product(w[u].x2, kPhiloxM1);
      w[u] = {exclusive_or(high_of(p1), w[u].x1, keys.round[2 * round]), p1,
              exclusive_or(high_of(p0), w[u].x3, keys.round[2 * round + 1]), p0};
      in_this_order(w[u].x0, w[u].x2);
    }
}

// The 16-bit halves of kGroup Philox calls.
template <bool PAIRS>
inline __attribute__((always_inline)) void philox_block(const Keys &keys, const Chunks &chunks, H *halves) {
  Lanes w[kParts];
  for (int u = 0; u < kParts; ++u)
    w[u] = counters_of(keys, chunks.part[u]);
  philox_rounds<0, kParts>(keys, w);
  for (int u = 0; u < kParts; ++u)
    halves_of<PAIRS>(w[u], halves + 2 * u);
}

// What the first three rounds take from the words that all counters of a run share, whose chunks have the same
// upper half: with keys, what their first products are joined with, and x3 after the second round.
struct Prefix {
  decltype(Lanes::x0) x2, next_x0, next_x2, x3;
};

inline Prefix prefix_of(const Keys &keys, uint64_t chunk) {
  const Lanes w = counters_of(keys, chunks_from<false>(chunk >> 32 << 32).part[0]);
  const auto p1 = product(w.x2, kPhiloxM1);
  const auto p0 = product(exclusive_or(high_of(p1), w.x1, keys.round[0]), kPhiloxM0);
  return {exclusive_or(keys.tensor_id, keys.round[1]), exclusive_or(p1, keys.round[2]),
          exclusive_or(high_of(p0), keys.round[3]), p0};
}

// Keys, with the prefix of the run at hand; most runs of a tensor have the same.
struct Stream {
  Keys keys;
  Prefix prefix;
  uint32_t x1;

  explicit Stream(const Names &names) : keys(keys_of(names)) { start(0, names.direction); }
  void turn_to(uint64_t chunk, uint32_t direction) {
    if (x1 != word(chunk, direction))
      start(chunk, direction);
  }

private:
  static uint32_t word(uint64_t chunk, uint32_t direction) { return uint32_t(chunk >> 32) | direction << 16; }
  void start(uint64_t chunk, uint32_t direction) {
    set_direction(keys, direction);
    prefix = prefix_of(keys, chunk);
    x1 = word(chunk, direction);
  }
};

// The halves of COUNT vectors of calls of the run: their first two rounds take one product each.
template <bool PAIRS, int COUNT>
inline __attribute__((always_inline)) void philox_calls(const Stream &stream, decltype(Lanes::x0) chunks,
                                                        H *halves) {
  const Prefix &prefix = stream.prefix;
  Lanes w[COUNT];
#pragma GCC unroll 4
  for (int u = 0; u < COUNT; ++u) {
    const auto p0 = product(plus(chunks, u * kCalls), kPhiloxM0);
    const auto p1 = product(exclusive_or(high_of(p0), prefix.x2), kPhiloxM1);
    w[u] = {exclusive_or(high_of(p1), prefix.next_x0), p1, exclusive_or(p0, prefix.next_x2), prefix.x3};
  }
  philox_rounds<2, COUNT>(stream.keys, w);
#pragma GCC unroll 4
  for (int u = 0; u < COUNT; ++u)
    halves_of<PAIRS>(w[u], halves + 2 * u);
}

// Float32 operands of the elements whose noise is drawn; null: none. They come from memory meanwhile, a few
// lines at a time: a prefetch that waits for a buffer holds up what follows it.
struct Operands {
  const float *first = nullptr, *second = nullptr;

  void prefetch(int64_t elements) {
    if (!first)
      return;
    for (int64_t i = 0; i < elements; i += 64 / int64_t(sizeof(float))) {
      __builtin_prefetch(first + i);
      __builtin_prefetch(second + i);
    }
    first += elements, second += elements;
  }
};

// The halves of `vectors` of calls of the run from `chunk` on, two of each. Apart from what is done with them:
// so all registers are there for several calls at once, and for that.
template <bool PAIRS>
__attribute__((noinline)) void draw_halves(const Stream &stream, uint64_t chunk, int64_t vectors, H *halves,
                                           Operands operands) {
  auto chunks = chunks_from<PAIRS>(chunk).part[0];
  for (; vectors >= kAtOnce; vectors -= kAtOnce, halves += 2 * kAtOnce) {
    operands.prefetch(kAtOnce * kCalls * 8);
    philox_calls<PAIRS, kAtOnce>(stream, chunks, halves);
    chunks = plus(chunks, kAtOnce * kCalls);
  }
  for (; vectors >= 2; vectors -= 2, halves += 4) {
    philox_calls<PAIRS, 2>(stream, chunks, halves);
    chunks = plus(chunks, 2 * kCalls);
  }
  if (vectors)
    philox_calls<PAIRS, 1>(stream, chunks, halves);
}

// The halves of `chunks` Philox calls, in order; writes up to kGroup - 1 calls more.
void philox_halves(const Names &names, uint64_t chunk, int64_t chunks, uint16_t *halves) {
  const Keys keys = keys_of(names);
  for (int64_t done = 0; done < chunks; done += kGroup, halves += 8 * kGroup) {
    H block[kHalves];
    philox_block<true>(keys, chunks_from<true>(chunk + uint64_t(done)), block);
    std::memcpy(halves, block, sizeof block);
  }
}

// ---- noise and operands

// k of the elements of h, as words
template <bool PAIRS> inline void numbers_of(H h, U &first, U &last) {
  if (!PAIRS)
    return extend(h, first, last);
  first = words_of(h) & 0xFFFFu;
  last = words_of(h) >> 16;
}

// k << 16 | below
template <bool PAIRS> inline void raised(H h, uint16_t below, U &first, U &last) {
  if (!PAIRS)
    return raise(h, int16_t(below), first, last);
  const U words = words_of(h);
  first = below ? (words << 16) | uint32_t(below) : words << 16;
  last = masked_or(words, 0xFFFF0000u, below);
}

// noise(): m times the factor, of the elements of h. The factor is a power of two, which the caller takes out
// of the coefficient of m: exact.
template <Distribution D> struct Drawn;

template <> struct Drawn<Distribution::uniform> {
  static constexpr float factor = 32768.0f;
  template <bool PAIRS> static inline void noise(H h, F &first, F &last) {
    U low, high;
    raised<PAIRS>(h, 0x8000, low, high);
    first = float_from(low);
    last = float_from(high);
  }
};

template <> struct Drawn<Distribution::rademacher> {
  static constexpr float factor = 1.0f;
  template <bool PAIRS> static inline void noise(H h, F &first, F &last) {
    U low, high;
    raised<PAIRS>(h, 0, low, high);
    first = float_of(masked_or(low, 0x80000000u, 0x3F800000u));
    last = float_of(masked_or(high, 0x80000000u, 0x3F800000u));
  }
};

template <> struct Drawn<Distribution::triangular> {
  static constexpr float factor = 65536.0f;
  template <bool PAIRS> static inline void noise(H h, F &first, F &last) {
    U low, high;
    raised<PAIRS>(byte_sums(h), 0, low, high);
    first = float_from(low);
    last = float_from(high);
  }
};

// These two are in two parts, the second with what the first one left in `first` and `last`.
template <> struct Drawn<Distribution::logistic> {
  static constexpr float factor = 1.0f;
  static inline F ratio(F k) { return (k + 0.5f) / (65535.5f - k); }
  template <bool PAIRS> static inline void begin(H h, F &first, F &last) {
    U low, high;
    numbers_of<PAIRS>(h, low, high);
    first = ratio(float_from(low));
    last = ratio(float_from(high));
  }
  template <bool PAIRS> static inline void end(H, F &first, F &last) {
    first = log_of(first);
    last = log_of(last);
  }
};

template <> struct Drawn<Distribution::gaussian> { // Box-Muller on words: an even and an odd element
  static constexpr float factor = 1.0f;
  template <bool PAIRS> static inline void begin(H h, F &first, F &) {
    first = log_of((float_from(words_of(h) & 0xFFFFu) + 0.5f) * (1.0f / 65536)) * -2.0f;
  }
  template <bool PAIRS> static inline void end(H h, F &first, F &last) {
    const F radius = root(first);
    F cosine, sine; // the angle is (2 ks + 1) / 65536 = (65536 ks + 32768) / 2^31
    cos_sin_pi(float_from(masked_or(words_of(h), 0xFFFF0000u, 0x8000u)) * (1.0f / 2147483648.0f), cosine, sine);
    first = radius * cosine;
    last = radius * sine;
    if (!PAIRS)
      interleave(first, last, first, last);
  }
};

template <Distribution D> constexpr bool in_parts = D == Distribution::logistic || D == Distribution::gaussian;

template <Distribution D, bool PAIRS> inline void noise_of(H h, F &first, F &last) {
  if constexpr (in_parts<D>) {
    Drawn<D>::template begin<PAIRS>(h, first, last);
    Drawn<D>::template end<PAIRS>(h, first, last);
  } else {
    Drawn<D>::template noise<PAIRS>(h, first, last);
  }
}

constexpr int64_t kDrawn = 24; // vectors of halves that a run draws at a time
static_assert(kDrawn % (2 * kAtOnce) == 0, "as many as are made at once");

// Noise of up to kDrawn vectors of halves of a run. Each part goes over all of them: a loop is as fast as its
// chain of instructions is short.
template <Distribution D, bool PAIRS> struct RunNoise {
  H halves[kDrawn];
  F parts[in_parts<D> ? 2 * kDrawn : 1];

  void draw(const Stream &stream, uint64_t chunk, int64_t count, const Operands &operands = {}) {
    draw_halves<PAIRS>(stream, chunk, count / 2, halves, operands);
    if constexpr (in_parts<D>) {
#pragma GCC unroll 1
      for (int64_t h = 0; h < count; ++h)
        Drawn<D>::template begin<PAIRS>(halves[h], parts[2 * h], parts[2 * h + 1]);
#pragma GCC unroll 1
      for (int64_t h = 0; h < count; ++h)
        Drawn<D>::template end<PAIRS>(halves[h], parts[2 * h], parts[2 * h + 1]);
    }
  }

  void get(int64_t h, F &first, F &last) const {
    if constexpr (in_parts<D>) {
      first = parts[2 * h], last = parts[2 * h + 1];
    } else {
      Drawn<D>::template noise<PAIRS>(halves[h], first, last);
    }
  }
};

template <Dtype T, bool PAIRS> inline void load_two(const void *data, int64_t i, F &first, F &last) {
  if (PAIRS) {
    const U words = load_words(data, i);
    first = float_of(words << 16);
    last = float_of(words & 0xFFFF0000u);
  } else {
    first = load_as<T>(data, i);
    last = load_as<T>(data, i + kWidth);
  }
}

template <Dtype T, bool PAIRS, Narrow N> inline void store_two(void *data, int64_t i, F first, F last) {
  if (PAIRS)
    return store_pairs<T, N>(data, i, first, last);
  store_as<T, N>(data, i, first);
  store_as<T, N>(data, i + kWidth, last);
}
