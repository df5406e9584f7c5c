// Noise of a tensor (docs/contract.md, section 2): Philox calls, one for each chunk of 8 elements, 16-bit
// halves of their words, and m of these.
#pragma once

#include "tiles.h"

namespace fogzo::cpu {
namespace {

// The names of a tensor's noise.
inline Names names_in(const Noise &noise, const Operands &item) {
  Names names = noise.names;
  names.tensor_id = item.tensor_id;
  return names;
}

// Elements from e on whose chunks have numbers of the same upper half.
inline int64_t same_half_from(int64_t e) { return (int64_t(1) << 35) - e % (int64_t(1) << 35); }

#if FOGZO_ISA
constexpr int64_t kGroup = kWidth; // Philox calls of a batch

// A batch: kGroup chunks, for each of which a vector of floats holds one value.
constexpr int64_t kBatch = 8 * kGroup;         // elements
constexpr int kHalves = kBatch / (2 * kWidth); // H of a batch
constexpr int64_t kCalls = kGroup / 2;         // Philox calls of a vector

// ---- Philox

// A key and a counter's fixed words, spread over vectors.
struct Keys {
  Wide round[2 * kPhiloxRounds], direction, step, tensor_id;

  explicit Keys(const Names &names) : step(Wide{} + names.step), tensor_id(Wide{} + names.tensor_id) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
      round[2 * i] = Wide{} + (uint32_t(names.seed) + uint32_t(i) * kPhiloxW0);
      round[2 * i + 1] = Wide{} + (uint32_t(names.seed >> 32) + uint32_t(i) * kPhiloxW1);
    }
    turn_to(names.direction);
  }
  void turn_to(uint32_t number) { direction = Wide{} + (uint64_t(number) << 16); }
};

// The words of kCalls Philox calls. They lie in 64-bit lanes, so that one multiply yields both halves of a
// product; the upper halves of lanes hold rubbish that nothing reads.
struct Lanes {
  Wide x0, x1, x2, x3;
};

inline Wide product(Wide x, uint32_t m) { return Wide(FOGZO_MM(mul_epu32)(Raw(x), Raw(Wide{} + m))); }
// a shuffle, since a shift would compete with the multiplies for a port
inline Wide high_of(Wide p) { return Wide(FOGZO_MM(shuffle_epi32)(Raw(p), _MM_PERM_DDBB)); }

// The numbers of kCalls chunks from `chunk` on.
inline Wide chunks_from(uint64_t chunk) {
  alignas(64) static constexpr uint64_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
  return read<Wide>(numbers) + chunk;
}

inline Lanes counters_of(const Keys &keys, Wide chunks) {
  return {chunks, chunks >> 32 | keys.direction, keys.step, keys.tensor_id};
}

// the rounds from round FROM on, of COUNT vectors: a round is a chain of slow instructions
template <int FROM, int COUNT>
inline __attribute__((always_inline)) void philox_rounds(const Keys &keys, Lanes *w) {
#pragma GCC unroll 10
  for (int round = FROM; round < kPhiloxRounds; ++round)
#pragma GCC unroll 4
    for (int u = 0; u < COUNT; ++u) {
      const Wide p0 = product(w[u].x0, kPhiloxM0), p1 = product(w[u].x2, kPhiloxM1);
      w[u] = {exclusive_or(high_of(p1), w[u].x1, keys.round[2 * round]), p1,
              exclusive_or(high_of(p0), w[u].x3, keys.round[2 * round + 1]), p0};
      in_this_order(w[u].x0, w[u].x2);
    }
}

template <bool PAIRS> inline void halves_of(const Lanes &w, H *halves) {
  join_halves<PAIRS>(odd_words(w.x0, w.x1), odd_words(w.x2, w.x3), halves);
}

// Keys, and what the first three rounds make of the words that all counters of a run share. The chunks of a run
// have the same upper half. x2, next_x0 and next_x2 are joined with products; x3 is that after the second
// round.
struct Stream {
  Keys keys;
  Wide x2, next_x0, next_x2, x3;
  uint32_t x1;

  explicit Stream(const Names &names) : keys(names) { start(0, names.direction); }
  void turn_to(uint64_t chunk, uint32_t direction) {
    if (x1 != word(chunk, direction))
      start(chunk, direction);
  }

private:
  static uint32_t word(uint64_t chunk, uint32_t direction) { return uint32_t(chunk >> 32) | direction << 16; }
  void start(uint64_t chunk, uint32_t direction) {
    keys.turn_to(direction);
    x1 = word(chunk, direction);
    const Lanes w = counters_of(keys, Wide{} + (chunk >> 32 << 32));
    const Wide p1 = product(w.x2, kPhiloxM1);
    const Wide p0 = product(high_of(p1) ^ w.x1 ^ keys.round[0], kPhiloxM0);
    x2 = keys.tensor_id ^ keys.round[1];
    next_x0 = p1 ^ keys.round[2];
    next_x2 = high_of(p0) ^ keys.round[3];
    x3 = p0;
  }
};

// The halves of COUNT vectors of calls of the run: their first two rounds take one product each.
template <bool PAIRS, int COUNT>
inline __attribute__((always_inline)) void philox_calls(const Stream &stream, Wide chunks, H *halves) {
  Lanes w[COUNT];
#pragma GCC unroll 4
  for (int u = 0; u < COUNT; ++u) {
    const Wide p0 = product(chunks + uint64_t(u * kCalls), kPhiloxM0);
    const Wide p1 = product(high_of(p0) ^ stream.x2, kPhiloxM1);
    w[u] = {high_of(p1) ^ stream.next_x0, p1, p0 ^ stream.next_x2, stream.x3};
  }
  philox_rounds<2, COUNT>(stream.keys, w);
#pragma GCC unroll 4
  for (int u = 0; u < COUNT; ++u)
    halves_of<PAIRS>(w[u], halves + 2 * u);
}

// The halves of `vectors` of calls of the run from `chunk` on, two of each. A function of its own has all
// registers for several calls at once. The two operands of the elements, if they are given, come from memory
// meanwhile, a few lines at a time: a prefetch that waits for a buffer holds up what follows it.
template <bool PAIRS>
__attribute__((noinline)) void draw_halves(const Stream &stream, uint64_t chunk, int64_t vectors, H *halves,
                                           const float *first, const float *second) {
  Wide chunks = ordered<PAIRS>(chunks_from(chunk));
  for (; vectors >= kAtOnce; vectors -= kAtOnce, halves += 2 * kAtOnce) {
    for (int64_t i = 0; first && i < kAtOnce * kCalls * 8; i += 16, first += 16, second += 16) {
      __builtin_prefetch(first);
      __builtin_prefetch(second);
    }
    philox_calls<PAIRS, kAtOnce>(stream, chunks, halves);
    chunks += uint64_t(kAtOnce * kCalls);
  }
  for (; vectors >= 2; vectors -= 2, halves += 4) {
    philox_calls<PAIRS, 2>(stream, chunks, halves);
    chunks += uint64_t(2 * kCalls);
  }
  if (vectors)
    philox_calls<PAIRS, 1>(stream, chunks, halves);
}

// ---- m

// k of the elements of h, as words
template <bool PAIRS> inline void numbers_of(H h, U &first, U &last) {
  first = PAIRS ? U(h) & 0xFFFFu : U(FOGZO_MM(unpacklo_epi16)(Raw(h), Raw{}));
  last = PAIRS ? U(h) >> 16 : U(FOGZO_MM(unpackhi_epi16)(Raw(h), Raw{}));
}

// k << 16 | below
template <bool PAIRS> inline void raised(H h, uint16_t below, U &first, U &last) {
  const Raw under = Raw(H{} + below);
  const U words = U(h) << 16;
  first = !PAIRS ? U(FOGZO_MM(unpacklo_epi16)(under, Raw(h))) : below ? words | uint32_t(below) : words;
  last = PAIRS ? masked_or(U(h), 0xFFFF0000u, below) : U(FOGZO_MM(unpackhi_epi16)(under, Raw(h)));
}

// The power of two by which begin_noise() multiplies m. The caller takes it out of the coefficient of m: exact.
template <Distribution D>
constexpr float kNoiseFactor = D == Distribution::uniform      ? 32768.0f
                               : D == Distribution::triangular ? 65536.0f
                                                               : 1.0f;

// Distributions whose m takes two parts: end_noise() makes it of what begin_noise() gives.
template <Distribution D> constexpr bool in_parts = D == Distribution::logistic || D == Distribution::gaussian;

inline F odds_of(F k) { return (k + 0.5f) / (65535.5f - k); }

template <Distribution D, bool PAIRS> inline Two begin_noise(H h) {
  U first, last;
  if constexpr (D == Distribution::gaussian) { // Box-Muller on words: an even and an odd element
    return {log_of((float_from(U(h) & 0xFFFFu) + 0.5f) * (1.0f / 65536)) * -2.0f, F{}};
  } else if constexpr (D == Distribution::logistic) {
    numbers_of<PAIRS>(h, first, last);
    return {odds_of(float_from(first)), odds_of(float_from(last))};
  } else if constexpr (D == Distribution::rademacher) {
    raised<PAIRS>(h, 0, first, last);
    return {float_of(masked_or(first, 0x80000000u, 0x3F800000u)),
            float_of(masked_or(last, 0x80000000u, 0x3F800000u))};
  } else if constexpr (D == Distribution::uniform || D == Distribution::triangular) {
    if (D == Distribution::uniform)
      raised<PAIRS>(h, 0x8000, first, last);
    else
      raised<PAIRS>((h & 0xFF) + (h >> 8) - 255, 0, first, last);
    return {float_from(first), float_from(last)};
  } else {
    static_assert(unknown<D>, "begin_noise() must know each distribution");
  }
}

template <Distribution D, bool PAIRS> inline Two end_noise(H h, const Two &m) {
  if constexpr (D == Distribution::logistic) {
    return {log_of(m.first), log_of(m.last)};
  } else if constexpr (D == Distribution::gaussian) {
    const F radius = FOGZO_MM(sqrt_ps)(m.first);
    F cosine, sine; // the angle is (2 ks + 1) / 65536 = (65536 ks + 32768) / 2^31
    cos_sin_pi(float_from(masked_or(U(h), 0xFFFF0000u, 0x8000u)) * (1.0f / 2147483648.0f), cosine, sine);
    const F even = radius * cosine, odd = radius * sine;
    if (PAIRS)
      return {even, odd};
    return {FOGZO_MM(unpacklo_ps)(even, odd), FOGZO_MM(unpackhi_ps)(even, odd)};
  } else {
    return m;
  }
}

constexpr int64_t kDrawn = 24;                           // vectors of halves that are drawn at a time
constexpr int64_t kFewDrawn = FOGZO_ISA == 512 ? 8 : 12; // the same where memory must not wait for noise
static_assert(kDrawn % (2 * kAtOnce) == 0 && kFewDrawn % (2 * kAtOnce) == 0, "as many as are made at once");

// Noise of up to kDrawn vectors of halves. Each part goes over all of them: a loop is as fast as its chain of
// instructions is short.
template <Distribution D, bool PAIRS> struct DrawnNoise {
  H halves[kDrawn];
  Two parts[in_parts<D> ? kDrawn : 1];

  void draw(const Stream &stream, uint64_t chunk, int64_t count, const float *first = nullptr,
            const float *second = nullptr) {
    draw_halves<PAIRS>(stream, chunk, count / 2, halves, first, second);
    finish(count);
  }
  void draw_batch(const Keys &keys, const uint64_t *chunks) {
    Lanes w[] = {counters_of(keys, ordered<PAIRS>(read<Wide>(chunks))),
                 counters_of(keys, ordered<PAIRS>(read<Wide>(chunks + kCalls)))};
    philox_rounds<0, 2>(keys, w);
    halves_of<PAIRS>(w[0], halves);
    halves_of<PAIRS>(w[1], halves + 2);
    finish(kHalves);
  }
  Two get(int64_t h) const {
    if constexpr (in_parts<D>)
      return {parts[h].first, parts[h].last}; // compilers copy a struct by smaller vectors
    else
      return begin_noise<D, PAIRS>(halves[h]);
  }

private:
  void finish(int64_t count) {
    if constexpr (in_parts<D>) {
#pragma GCC unroll 1
      for (int64_t h = 0; h < count; ++h)
        parts[h] = begin_noise<D, PAIRS>(halves[h]);
#pragma GCC unroll 1
      for (int64_t h = 0; h < count; ++h)
        parts[h] = end_noise<D, PAIRS>(halves[h], parts[h]);
    }
  }
};

// m of the consecutive elements e .. e + count - 1, count <= kTile
template <Distribution D> void noise_run(Stream &stream, uint64_t e, int64_t count, float *m) {
  constexpr int64_t step = 4 * kWidth; // elements of a vector of calls
  alignas(64) float drawn[kTile + step];
  const int64_t shift = int64_t(e & 7), vectors = (shift + count + step - 1) / step * 2;
  float *const out = shift == 0 && count % step == 0 ? m : drawn;
  stream.turn_to(e >> 3, stream.x1 >> 16); // the same direction
  DrawnNoise<D, false> noise;
  for (int64_t done = 0; done < vectors; done += kDrawn) {
    const int64_t now = least(kDrawn, vectors - done);
    noise.draw(stream, (e >> 3) + uint64_t(done * kWidth / 4), now);
    for (int64_t h = 0; h < now; ++h) {
      const Two two = noise.get(h);
      write(out + 2 * kWidth * (done + h), two.first * (1.0f / kNoiseFactor<D>));
      write(out + 2 * kWidth * (done + h) + kWidth, two.last * (1.0f / kNoiseFactor<D>));
    }
  }
  if (out != m)
    std::memcpy(m, drawn + shift, count * sizeof(float));
}

#else
using Stream = Names;

constexpr int64_t kCalls = 16; // Philox calls at a time

// m of the consecutive elements e .. e + count - 1, count <= kTile
template <Distribution D> void noise_run(const Names &names, uint64_t e, int64_t count, float *m) {
  const int64_t shift = int64_t(e & 7), calls = (shift + count + 7) / 8;
  uint16_t halves[kTile + 8 * kCalls + 8];
  for (int64_t done = 0; done < calls; done += kCalls)
    FOGZO_LOOP(int64_t l = done; l < done + kCalls; ++l) {
      const Words words = noise_words(names, (e >> 3) + uint64_t(l));
      for (int w = 0; w < 4; ++w) {
        halves[8 * l + 2 * w] = uint16_t(words.x[w]);
        halves[8 * l + 2 * w + 1] = uint16_t(words.x[w] >> 16);
      }
    }
  if constexpr (D != Distribution::gaussian) {
    FOGZO_LOOP(int64_t i = 0; i < count; ++i) m[i] = noise_of_half<D>(halves[shift + i]);
  } else {
    float pairs[kTile + 16]; // a word's pair may straddle the ends of the run
    FOGZO_LOOP(int64_t w = 0; w < (shift + count + 1) / 2; ++w) {
      const Pair pair = noise_of_word(halves[2 * w], halves[2 * w + 1]);
      pairs[2 * w] = pair.even;
      pairs[2 * w + 1] = pair.odd;
    }
    std::memcpy(m, pairs + shift, count * sizeof(float));
  }
}
#endif

// m of local elements begin .. begin + count - 1 of a shard, count <= kTile
void noise_tile(const Noise &noise, const Layout &layout, int64_t begin, int64_t count, float *m) {
  with_value(noise.distribution, [&](auto D) {
    Stream stream(noise.names);
    for (int64_t done = 0; done < count;) {
      const int64_t row = (begin + done) / layout.inner, column = (begin + done) % layout.inner;
      const int64_t e = layout.offset + row * layout.stride + column;
      const int64_t run = least(least(count - done, layout.inner - column), same_half_from(e));
      noise_run<decltype(D)::value>(stream, uint64_t(e), run, m + done);
      done += run;
    }
  });
}

void noise_range(const Operands &item, const Noise &given, float scale, int64_t begin, int64_t end) {
  const Noise noise{given.distribution, names_in(given, item)};
  float *const out = static_cast<float *>(item.plus.data);
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    noise_tile(noise, item.layout, start, count, out + start);
    FOGZO_LOOP(int64_t i = start; i < start + count; ++i) out[i] *= scale;
  });
}

} // namespace
} // namespace fogzo::cpu
