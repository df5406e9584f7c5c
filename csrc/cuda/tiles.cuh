// Where a block works, and the chunks of 8 elements that its threads hold.
//
// A block takes a span of consecutive elements of one tensor, which a row of the plan's table describes
// (Column). Full chunks, up to the row's FAST, go two a thread and turn, by 16-byte accesses where memory is
// aligned; the rest, most often at most 7 elements, element by element.
#pragma once

#include "hardware.cuh"
#include "ops.h"

namespace fogzo::cuda {

struct Tables {
  const int64_t *table;
  const int32_t *owner;
};

inline Tables tables_of(const Plan &plan) { return {plan.table, plan.owner}; }

// ---- a block's part of a tensor

struct Part {
  const int64_t *row;
  int64_t begin; // of the block, in the tensor
  int span;      // elements of a block

  FOGZO_DEVICE int64_t operator[](Column column) const { return row[column]; }
  FOGZO_DEVICE int64_t end() const {
    const int64_t last = begin + span, numel = row[NUMEL];
    return last < numel ? last : numel;
  }
  FOGZO_DEVICE bool aligned() const { return row[ALIGNED] != 0; }
  // Full chunks, and the first element of the rest.
  FOGZO_DEVICE int chunks() const {
    const int64_t left = row[FAST] - begin;
    return int(left < 0 ? 0 : left < span ? left : span) / kChunk;
  }
  FOGZO_DEVICE int64_t rest() const { return begin > row[FAST] ? begin : row[FAST]; }
  // Address of the block's first element; of an operand that is absent, null or unused.
  FOGZO_DEVICE char *address(Column column, int bytes) const {
    return reinterpret_cast<char *>(row[column]) + begin * bytes;
  }
  template <class T> FOGZO_DEVICE T *pointer(Column column) const { return reinterpret_cast<T *>(row[column]); }
};

FOGZO_DEVICE Part part_of(const Tables &tables, int64_t number) {
  const int64_t *row = tables.table + int64_t(tables.owner[number]) * COLUMNS;
  return {row, (number - row[FIRST]) * row[SPAN], int(row[SPAN])};
}

FOGZO_DEVICE Part part_of(const Tables &tables) { return part_of(tables, block()); }

// n / d for 0 <= n < 2^31, given plans.divisor(d)
FOGZO_DEVICE uint32_t divide(uint32_t n, int64_t packed) {
  return uint32_t((uint64_t(n) * uint32_t(uint64_t(packed) >> 6)) >> (packed & 63));
}

// Where the tensor's chunks lie in the whole parameter. Plain: not sharded, or one contiguous shard.
struct Layout {
  int64_t offset, skip, inner; // the first two in chunks; inner is a divisor
  uint32_t first;              // the block's first chunk in the tensor; 32 bits reach 2^35 elements
};

template <bool Plain> FOGZO_DEVICE Layout layout_of(const Part &part) {
  const uint32_t first = uint32_t(part.begin >> 3);
  if (Plain)
    return {(part[OFFSET] >> 3) + first, 0, 0, first};
  return {part[OFFSET] >> 3, part[SKIP] >> 3, part[INNER_DIVISOR], first};
}

// Number in the parameter of the block's chunk c.
template <bool Plain> FOGZO_DEVICE int64_t chunk_number(const Layout &layout, int c) {
  if (Plain)
    return layout.offset + c;
  const uint32_t local = layout.first + uint32_t(c);
  return layout.offset + local + int64_t(divide(local, layout.inner)) * layout.skip;
}

FOGZO_DEVICE int64_t element_number(const Part &part, int64_t j) {
  return part[OFFSET] + j + j / part[INNER] * part[SKIP];
}

// ---- scales

// 1 / x, correctly rounded for 2^-100 <= x <= 2^100: one Newton step on the approximation. The compiler makes
// rcp.rn.f32 of the same instructions, though PTX only promises that an approximation is within one ulp, from
// which the step is right for all mantissas but that of all ones (python_tests/test_machine_code.py).
FOGZO_DEVICE float reciprocal(float x) {
  const float y = fast_rcp(x);
  return std::fma(y, std::fma(-x, y, 1.0f), y);
}

FOGZO_DEVICE Scale scale_of(float alpha, float r) {
  const float delta = alpha * r;
  return {delta, reciprocal(delta)};
}

// Plain: one alpha for the tensor, read before the loop. Else one per chunk.
struct Scales {
  const float *alpha;
  int64_t length; // chunks that share an alpha, as a divisor
  uint32_t first;
  float r;
  Scale one;
};

template <bool Plain> FOGZO_DEVICE Scales scales_of(const Part &part, float r) {
  const float *alpha = part.pointer<const float>(ALPHA);
  if (Plain)
    return {alpha, 0, 0, r, scale_of(*global(alpha), r)};
  return {alpha, part[SCALE_DIVISOR], uint32_t(part.begin >> 3), r, {}};
}

template <bool Plain> FOGZO_DEVICE Scale chunk_scale(const Scales &scales, int c) {
  if (Plain)
    return scales.one;
  return scale_of(*global(scales.alpha + divide(scales.first + uint32_t(c), scales.length)), scales.r);
}

FOGZO_DEVICE Scale element_scale(const Part &part, int64_t j, float r) {
  return scale_of(*global(part.pointer<const float>(ALPHA) + j / part[SCALE_LENGTH]), r);
}

// ---- chunks in memory

FOGZO_DEVICE int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }

// T, or the dtype of the run: constant where a kernel is compiled for T.
template <Dtype T> FOGZO_DEVICE Dtype actual(Dtype dtype) { return T == Dtype::any ? dtype : T; }

// A chunk as it lies in memory; the second half is that of float32.
struct Raw {
  Words4 low, high;
};

// Of a tensor all chunks lie aligned to 16 bytes, or none: a gradient may begin anywhere in a bucket of many. A
// loop over chunks is compiled for rows whose tensors all do, and for others, where each tensor is looked at.
// Noise is drawn by the chunk in both.
FOGZO_DEVICE bool lies_aligned(const void *at) { return uintptr_t(at) % 16 == 0; }

FOGZO_DEVICE Raw load_elements(const char *base, int c, Dtype dtype) {
  uint32_t words[8] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int64_t j = int64_t(c) * kChunk + i;
    if (dtype == Dtype::float32)
      words[i] = *global(reinterpret_cast<const uint32_t *>(base) + j);
    else
      words[i / 2] |= uint32_t(*global(reinterpret_cast<const uint16_t *>(base) + j)) << 16 * (i & 1);
  }
  return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

template <bool Aligned> FOGZO_DEVICE Raw load_chunk(const char *base, int c, Dtype dtype) {
  if (!Aligned && !lies_aligned(base))
    return load_elements(base, c, dtype);
  const char *at = base + int64_t(c) * (kChunk * bytes_of(dtype));
  return {load16(at), dtype == Dtype::float32 ? load16(at + 16) : Words4{}};
}

FOGZO_DEVICE void widen_half(uint32_t word, Dtype dtype, float &even, float &odd) {
  if (dtype == Dtype::bfloat16) {
    even = float_of(word << 16);
    odd = float_of(word & 0xFFFF0000u);
  } else {
    even = widen_float16(word & 0xFFFFu);
    odd = widen_float16(word >> 16);
  }
}

FOGZO_DEVICE void widen(const Raw &raw, Dtype dtype, float (&x)[kChunk]) {
  const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = float_of(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      widen_half(words[i], dtype, x[2 * i], x[2 * i + 1]);
  }
}

template <bool Aligned>
FOGZO_DEVICE void load_widened(const char *base, int c, Dtype dtype, float (&x)[kChunk]) {
  widen(load_chunk<Aligned>(base, c, dtype), dtype, x);
}

FOGZO_DEVICE uint32_t pack(float even, float odd, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? pack_bfloat16(even, odd) : pack_float16(even, odd);
}

FOGZO_DEVICE float load_element(const void *base, int64_t j, Dtype dtype) {
  if (dtype == Dtype::float32)
    return *global(static_cast<const float *>(base) + j);
  float even, odd;
  widen_half(*global(static_cast<const uint16_t *>(base) + j), dtype, even, odd);
  return even;
}

FOGZO_DEVICE void store_element(void *base, int64_t j, float x, Dtype dtype) {
  if (dtype == Dtype::float32)
    *global(static_cast<float *>(base) + j) = x;
  else
    *global(static_cast<uint16_t *>(base) + j) = uint16_t(pack(x, 0.0f, dtype));
}

template <bool Aligned>
FOGZO_DEVICE void store_chunk(char *base, int c, const float (&x)[kChunk], Dtype dtype) {
  if (!Aligned && !lies_aligned(base)) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      store_element(base, int64_t(c) * kChunk + i, x[i], dtype);
    return;
  }
  char *at = base + int64_t(c) * (kChunk * bytes_of(dtype));
  if (dtype == Dtype::float32) {
    store16(at, {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
    store16(at + 16, {bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])});
  } else {
    store16(at, {pack(x[0], x[1], dtype), pack(x[2], x[3], dtype), pack(x[4], x[5], dtype),
                 pack(x[6], x[7], dtype)});
  }
}

// ---- quantized outputs

constexpr float kRounding = 12582912.0f; // 1.5 * 2^23: adding it rounds half to even

// The code in the low bits of its float: rint(min(max(y, qmin), qmax)) + kRounding; NaN gives qmin.
FOGZO_DEVICE float shifted_code(float y, const Grid &grid) {
  return fminf(fmaxf(y, grid.qmin), grid.qmax) + kRounding;
}

// delta * (code + offset), given shift = delta * offset: the same bits
FOGZO_DEVICE float value_of(float shifted, float delta, float shift) {
  return std::fma(shifted - kRounding, delta, shift);
}

FOGZO_DEVICE uint32_t four_bytes(float a, float b, float c, float d) {
  return permute(permute(bits_of(a), bits_of(b), 0x0040), permute(bits_of(c), bits_of(d), 0x0040), 0x5410);
}

// Codes, or values, of a chunk's positions y.
template <bool Aligned>
FOGZO_DEVICE void store_quantized(char *base, int c, const float (&y)[kChunk], float delta, const Grid &grid,
                                  Dtype dtype) {
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] = shifted_code(y[i], grid);
  if (dtype == Dtype::int8) {
    const uint32_t low = four_bytes(x[0], x[1], x[2], x[3]), high = four_bytes(x[4], x[5], x[6], x[7]);
    char *at = base + int64_t(c) * kChunk;
    if (Aligned || lies_aligned(base))
      return store8(at, low, high);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      *global(at + i) = char((i < 4 ? low : high) >> 8 * (i & 3));
    return;
  }
  const float shift = delta * grid.offset;
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    x[i] = value_of(x[i], delta, shift);
  store_chunk<Aligned>(base, c, x, dtype);
}

FOGZO_DEVICE void store_quantized_element(void *base, int64_t j, float y, float delta, const Grid &grid,
                                          Dtype dtype) {
  const float shifted = shifted_code(y, grid);
  if (dtype == Dtype::int8)
    *global(static_cast<uint8_t *>(base) + j) = uint8_t(bits_of(shifted));
  else
    store_element(base, j, value_of(shifted, delta, delta * grid.offset), dtype);
}

// ---- counters

// Alphas that are not finite or not > 0, each counted by the block that holds its first element: at the end of
// a kernel, when its loop has read them. Only what is wrong costs an access to the counters. Plain: one alpha.
template <bool Plain> FOGZO_DEVICE void count_bad_alphas(int64_t *counters, const Part &part) {
  if (!counters || !part[ALPHA] || (Plain && part.begin))
    return;
  const float *alpha = part.pointer<const float>(ALPHA);
  const int64_t length = part[SCALE_LENGTH];
  const int64_t first = Plain ? 0 : (part.begin + length - 1) / length;
  const int count = Plain ? 1 : int((part.end() + length - 1) / length - first);
  int bad = 0;
#pragma unroll 4
  for (int i = thread(); i < count; i += kThreads) {
    const float x = *global(alpha + first + i);
    bad += !(x > 0.0f && x < INFINITY);
  }
  for (; bad; --bad)
    add_one(counters + 2);
}

// position_of() of element.h, given the grid in this form
FOGZO_DEVICE float position(float theta, float inv, const Grid &grid) {
  return std::fma(theta, inv, -grid.offset);
}

} // namespace fogzo::cuda
