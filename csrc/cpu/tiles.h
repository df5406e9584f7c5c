// Tiles: pieces of a range that stay in the first-level cache, as float32. The compiler turns the loops over a
// tile into vectors.
#pragma once

#include "vector.h"

#if defined(__clang__)
#define FOGZO_LOOP _Pragma("clang loop vectorize(assume_safety)") for
#else
#define FOGZO_LOOP _Pragma("GCC ivdep") for // outputs are their own inputs or share nothing with them
#endif

namespace fogzo::cpu {
namespace {

constexpr int64_t kTile = 1024;
constexpr int kSums = 16; // partial sums, whatever the width of a vector

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t size_of(Dtype t) { return t == Dtype::float32 ? 4 : t == Dtype::int8 ? 1 : 2; }

inline char *address_of(const Span &span, int64_t i) {
  return reinterpret_cast<char *>(uintptr_t(span.data) + uintptr_t(i * size_of(span.dtype)));
}

// A buffer as a span that counts elements from the tensor's first, where the buffer begins with element
// `start`.
inline Span span_from(const void *buffer, Dtype dtype, int64_t start) {
  return {address_of({const_cast<void *>(buffer), dtype}, -start), dtype};
}
inline Span tile_span(const float *buffer, int64_t start) { return span_from(buffer, Dtype::float32, start); }

// A stream of loads alone is limited by their latency: the hardware's own prefetching stops at each page.
inline void prefetch_tile(const Span &span, int64_t begin) {
  for (int64_t line = 0; line < kTile * size_of(span.dtype); line += 64)
    __builtin_prefetch(address_of(span, begin) + line);
}

// ---- dtypes

void widen_half(const uint16_t *in, int64_t count, float *out) {
  int64_t i = 0;
#if FOGZO_ISA
  for (; i + kWidth <= count; i += kWidth)
    write(out + i, load_as<Dtype::float16>(in, i));
#endif
  for (; i < count; ++i)
    out[i] = static_cast<float>(torch::headeronly::Half(in[i], torch::headeronly::Half::from_bits()));
}

void narrow_half(const float *in, int64_t count, uint16_t *out) {
  int64_t i = 0;
#if FOGZO_ISA
  for (; i + kWidth <= count; i += kWidth)
    store_as<Dtype::float16, Narrow::any>(out, i, read<F>(in + i));
#endif
  for (; i < count; ++i)
    out[i] = torch::headeronly::Half(in[i]).x;
}

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
  const uint32_t bits = bits_of(x), nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
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

// ---- ranges

// body(first, last, scale) for each part of a tile that shares one alpha; indices within the tile
template <class Body>
void for_each_scale(const Operands &item, float r, int64_t begin, int64_t count, Body body) {
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

} // namespace
} // namespace fogzo::cpu
