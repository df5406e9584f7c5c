// The elements that a thread works on, and how it reads and writes them.
//
// A block takes a span of consecutive elements of one tensor, which a row of the plan's table describes
// (Column). Its threads take chunks of 8 elements up to the row's FAST, by accesses of 16 bytes where memory is
// aligned, and single elements from there on, of which there are mostly at most 7.
#pragma once

#include "hardware.cuh"
#include "ops.h"

namespace fogzo::cuda {

// ---- dtypes

// The dtypes that a kernel is compiled for; `any` is known when it runs.
template <Dtype L, Dtype G, Dtype O> struct Types {
  static constexpr Dtype latent = L, grad = G, out = O;
  static constexpr bool any = L == Dtype::any;

  static bool fits(const Dtypes &t) { return any || (t.latent == L && t.grad == G && t.out == O); }
  static FOGZO_DEVICE Dtypes of(const Dtypes &t) { return any ? t : Dtypes{L, G, O}; }
};

template <Dtype T> using Same = Types<T, T, T>;

FOGZO_DEVICE int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }

// ---- a block's part of a tensor

// The block's elements of one operand.
struct Operand {
  char *begin;
  Dtype dtype;
  int bytes = bytes_of(dtype); // of an element, which a kernel for any dtypes else computes anew in each turn

  FOGZO_DEVICE char *element(int64_t j) const { return begin + j * bytes; }
  FOGZO_DEVICE char *chunk(int64_t c) const { return begin + c * (kChunk * bytes); }
  // A product of unsigned numbers is one instruction, also where the dtype is known when the kernel runs.
  FOGZO_DEVICE char *chunk(int c) const { return begin + uint64_t(uint32_t(c)) * uint32_t(kChunk * bytes); }
};

// Gives the same operand. The compiler cannot see where its address comes from, so that it keeps it in a
// register instead of computing it anew in a loop.
FOGZO_DEVICE Operand opaque(Operand x) {
  asm("" : "+l"(x.begin));
  return x;
}

// Gives the same number of a chunk. The compiler multiplies it in each turn of a loop, instead of keeping an
// address for each access.
FOGZO_DEVICE int opaque(int c) {
  asm("" : "+r"(c));
  return c;
}

struct Part {
  const int64_t *row;
  int64_t begin; // of the block, in the tensor
  int span;      // elements of a block
  int tensor;    // number of the row

  FOGZO_DEVICE int64_t operator[](Column column) const { return row[column]; }
  FOGZO_DEVICE int64_t end() const {
    const int64_t last = begin + span, numel = row[NUMEL];
    return last < numel ? last : numel;
  }
  FOGZO_DEVICE bool aligned() const { return row[ALIGNED] != 0; }
  FOGZO_DEVICE int full_chunks() const {
    const int64_t left = row[FAST] - begin;
    return int(left < 0 ? 0 : left < span ? left : span) / kChunk;
  }
  // The first element behind the full chunks.
  FOGZO_DEVICE int64_t rest() const { return begin > row[FAST] ? begin : row[FAST]; }
  template <class T> FOGZO_DEVICE T *pointer(Column column) const { return reinterpret_cast<T *>(row[column]); }
  // The address of an operand that is absent must not be used.
  FOGZO_DEVICE Operand operand(Column column, Dtype dtype) const {
    const int bytes = bytes_of(dtype);
    return {pointer<char>(column) + begin * bytes, dtype, bytes};
  }
};

// The operands that most ops have. An op that lacks one does not use it.
struct Operands {
  Operand latent, grad, out;
};

FOGZO_DEVICE Operands operands_of(const Part &part, const Dtypes &t) {
  return {opaque(part.operand(LATENT, t.latent)), opaque(part.operand(GRAD, t.grad)),
          opaque(part.operand(PLUS, t.out))};
}

FOGZO_DEVICE Part part_of(const Plan &plan, int64_t number) {
  const int32_t tensor = plan.owner[number];
  const int64_t *row = plan.table + int64_t(tensor) * COLUMNS;
  return {row, (number - row[FIRST]) * row[SPAN], int(row[SPAN]), tensor};
}

FOGZO_DEVICE Part part_of(const Plan &plan) { return part_of(plan, block()); }

// Gives t of the block's tensor: how large its noise is. Without Own no tensor has a factor.
template <bool Own> FOGZO_DEVICE float factor_of(const float *factors, const Part &part) {
  return Own && factors ? *global(factors + part.tensor) : 1.0f;
}

// Gives n / d for 0 <= n < 2^31 and divisor(d) of plans.py.
FOGZO_DEVICE uint32_t divide(uint32_t n, int64_t packed) {
  return uint32_t((uint64_t(n) * uint32_t(uint64_t(packed) >> 6)) >> (packed & 63));
}

// Where the tensor's chunks lie in the whole parameter. Plain: the tensor is all of it, or one contiguous
// shard.
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

// The number of the block's chunk c in the parameter.
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

// Gives 1 / x, correctly rounded for 2^-100 <= x <= 2^100, by one Newton step on the approximation. The
// compiler makes rcp.rn.f32 of the same instructions. PTX only promises that the approximation is within one
// ulp; from there the step is right for all mantissas but the one of all ones
// (python_tests/test_machine_code.py).
FOGZO_DEVICE float reciprocal(float x) {
  const float y = fast_rcp(x);
  return std::fma(y, std::fma(-x, y, 1.0f), y);
}

FOGZO_DEVICE Scale scale_of(float alpha, float r) {
  const float delta = alpha * r;
  return {delta, reciprocal(delta)};
}

// Plain: the tensor has one alpha, which is read before the loop. Else each chunk reads its own.
struct Scales {
  const float *alpha;
  int64_t length; // chunks that share an alpha, as a divisor
  uint32_t first;
  float r;
  Scale shared;
};

template <bool Plain> FOGZO_DEVICE Scales scales_of(const Part &part, float r) {
  const float *alpha = part.pointer<const float>(ALPHA);
  if (Plain)
    return {alpha, 0, 0, r, scale_of(*global(alpha), r)};
  return {alpha, part[SCALE_DIVISOR], uint32_t(part.begin >> 3), r, {}};
}

template <bool Plain> FOGZO_DEVICE Scale chunk_scale(const Scales &scales, int c) {
  if (Plain)
    return scales.shared;
  return scale_of(*global(scales.alpha + divide(scales.first + uint32_t(c), scales.length)), scales.r);
}

FOGZO_DEVICE Scale element_scale(const Part &part, int64_t j, float r) {
  return scale_of(*global(part.pointer<const float>(ALPHA) + j / part[SCALE_LENGTH]), r);
}

// ---- chunks in memory

// A chunk as it lies in memory; only float32 has a second half.
struct Raw {
  Words4 low, high;
};

// All chunks of an operand are aligned to 16 bytes, or none is: a gradient may begin anywhere in a buffer. A
// loop over chunks is compiled twice: for rows whose operands are all aligned, and for others, where each
// operand is looked at. Both draw noise by the chunk.
FOGZO_DEVICE bool is_aligned(Operand x) { return uintptr_t(x.begin) % 16 == 0; }

FOGZO_DEVICE Raw load_elements(Operand x, int c) {
  uint32_t words[8] = {};
  unrolled<kChunk>([&](int i) {
    const char *at = x.element(int64_t(c) * kChunk + i);
    if (x.dtype == Dtype::float32)
      words[i] = *global(reinterpret_cast<const uint32_t *>(at));
    else
      words[i / 2] |= uint32_t(*global(reinterpret_cast<const uint16_t *>(at))) << 16 * (i & 1);
  });
  return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

template <bool Aligned, class Number> FOGZO_DEVICE Raw load_chunk(Operand x, Number c) {
  if (!Aligned && !is_aligned(x))
    return load_elements(x, int(c));
  const char *at = x.chunk(c);
  return {load16(at), x.dtype == Dtype::float32 ? load16(at + 16) : Words4{}};
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
  if (dtype == Dtype::float32)
    unrolled<kChunk>([&](int i) { x[i] = float_of(words[i]); });
  else
    unrolled<kChunk / 2>([&](int i) { widen_half(words[i], dtype, x[2 * i], x[2 * i + 1]); });
}

FOGZO_DEVICE uint32_t pack(float even, float odd, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? pack_bfloat16(even, odd) : pack_float16(even, odd);
}

FOGZO_DEVICE float load_element(Operand x, int64_t j) {
  if (x.dtype == Dtype::float32)
    return *global(reinterpret_cast<const float *>(x.element(j)));
  float even, odd;
  widen_half(*global(reinterpret_cast<const uint16_t *>(x.element(j))), x.dtype, even, odd);
  return even;
}

FOGZO_DEVICE void store_element(Operand out, int64_t j, float x) {
  if (out.dtype == Dtype::float32)
    *global(reinterpret_cast<float *>(out.element(j))) = x;
  else
    *global(reinterpret_cast<uint16_t *>(out.element(j))) = uint16_t(pack(x, 0.0f, out.dtype));
}

template <bool Aligned, class Number>
FOGZO_DEVICE void store_chunk(Operand out, Number c, const float (&x)[kChunk]) {
  if (!Aligned && !is_aligned(out))
    return unrolled<kChunk>([&](int i) { store_element(out, int64_t(c) * kChunk + i, x[i]); });
  char *at = out.chunk(c);
  const auto packed = [&](int i) { return pack(x[i], x[i + 1], out.dtype); };
  if (out.dtype == Dtype::float32) {
    store16(at, {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])});
    store16(at + 16, {bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])});
  } else {
    store16(at, {packed(0), packed(2), packed(4), packed(6)});
  }
}

// ---- quantized outputs

constexpr float kRounding = 12582912.0f; // 1.5 * 2^23: adding it rounds half to even

// Gives position_of() of element.h for the grid in this form.
FOGZO_DEVICE float position(float theta, float inv, const Grid &grid) {
  return std::fma(theta, inv, -grid.offset);
}

// The code in the low bits of its float: rint(min(max(y, qmin), qmax)) + kRounding; NaN gives qmin.
FOGZO_DEVICE float shifted_code(float y, const Grid &grid) {
  return fminf(fmaxf(y, grid.qmin), grid.qmax) + kRounding;
}

// Gives delta * (code + offset) for shift = delta * offset: the same bits.
FOGZO_DEVICE float value_of(float shifted, float delta, float shift) {
  return std::fma(shifted - kRounding, delta, shift);
}

FOGZO_DEVICE uint32_t four_bytes(float a, float b, float c, float d) {
  return permute(permute(bits_of(a), bits_of(b), 0x0040), permute(bits_of(c), bits_of(d), 0x0040), 0x5410);
}

// Stores codes, or values, of a chunk's positions y.
template <bool Aligned>
FOGZO_DEVICE void quantize_chunk(Operand out, int c, const float (&y)[kChunk], float delta, const Grid &grid) {
  float x[kChunk];
  unrolled<kChunk>([&](int i) { x[i] = shifted_code(y[i], grid); });
  if (out.dtype == Dtype::int8) {
    const uint32_t low = four_bytes(x[0], x[1], x[2], x[3]), high = four_bytes(x[4], x[5], x[6], x[7]);
    char *at = out.chunk(c);
    if (Aligned || is_aligned(out))
      return store8(at, low, high);
    return unrolled<kChunk>([&](int i) { *global(at + i) = char((i < 4 ? low : high) >> 8 * (i & 3)); });
  }
  const float shift = delta * grid.offset;
  unrolled<kChunk>([&](int i) { x[i] = value_of(x[i], delta, shift); });
  store_chunk<Aligned>(out, c, x);
}

FOGZO_DEVICE void quantize_element(Operand out, int64_t j, float y, float delta, const Grid &grid) {
  const float shifted = shifted_code(y, grid);
  if (out.dtype == Dtype::int8)
    *global(reinterpret_cast<uint8_t *>(out.element(j))) = uint8_t(bits_of(shifted));
  else
    store_element(out, j, value_of(shifted, delta, delta * grid.offset));
}

// ---- what a thread takes at once: chunks, or one element

// The constants of a thread block that its elements need.
template <bool Plain> struct Frame {
  Part part;
  Layout layout;
  Scales scales;
};

template <bool Plain> FOGZO_DEVICE Frame<Plain> frame_of(const Part &part, float r) {
  return {part, layout_of<Plain>(part), scales_of<Plain>(part, r)};
}

// Count chunks, `step` apart. Of a thread without work (`some`) nothing may be written.
template <int Count, bool Aligned, bool Plain> struct Chunks {
  using Loaded = Raw;
  static constexpr int count = Count, size = kChunk;
  static constexpr bool some = true, transformed = false;
  Frame<Plain> frame;
  int first, step;

  FOGZO_DEVICE int chunk(int k) const {
    if (Count > 1) // a constant distance from the first then becomes part of an access
      __builtin_assume(first >= 0);
    return first + k * step;
  }
  FOGZO_DEVICE int64_t number(int k) const { return chunk_number<Plain>(frame.layout, chunk(k)); }
  FOGZO_DEVICE Scale scale(int k) const { return chunk_scale<Plain>(frame.scales, chunk(k)); }
  FOGZO_DEVICE Raw load(Operand x, int k) const { return load_chunk<Aligned>(x, chunk(k)); }
  FOGZO_DEVICE void store(Operand out, int k, const float (&x)[kChunk]) const {
    store_chunk<Aligned>(out, chunk(k), x);
  }
  FOGZO_DEVICE void quantize(Operand out, int k, const float (&y)[kChunk], float delta,
                             const Grid &grid) const {
    quantize_chunk<Aligned>(out, chunk(k), y, delta, grid);
  }
  FOGZO_DEVICE void transform(float (&)[Count][kChunk]) const {}
};

// One element, by its place in the tensor.
template <bool Plain> struct Element {
  using Loaded = float;
  static constexpr int count = 1, size = 1;
  static constexpr bool some = true, transformed = false;
  Frame<Plain> frame;
  int64_t place;

  FOGZO_DEVICE int64_t local() const { return place - frame.part.begin; }
  FOGZO_DEVICE int64_t number(int) const { return element_number(frame.part, place); }
  FOGZO_DEVICE Scale scale(int) const { return element_scale(frame.part, place, frame.scales.r); }
  FOGZO_DEVICE float load(Operand x, int) const { return load_element(x, local()); }
  FOGZO_DEVICE void store(Operand out, int, const float (&x)[1]) const { store_element(out, local(), x[0]); }
  FOGZO_DEVICE void quantize(Operand out, int, const float (&y)[1], float delta, const Grid &grid) const {
    quantize_element(out, local(), y[0], delta, grid);
  }
  FOGZO_DEVICE void transform(float (&)[1][1]) const {}
};

FOGZO_DEVICE void widen(float loaded, Dtype, float (&x)[1]) { x[0] = loaded; }

// What a thread takes at once of an operand, as it lies in memory.
template <class Items> using Loads = typename Items::Loaded[Items::count];

template <class Items> FOGZO_DEVICE void load(const Items &at, Operand from, Loads<Items> &loads) {
  unrolled<Items::count>([&](int k) { loads[k] = at.load(from, k); });
}

// Loads what the thread may write, which no other thread may read.
template <class Items> FOGZO_DEVICE void load_own(const Items &at, Operand from, Loads<Items> &loads) {
  unrolled<Items::count>([&](int k) { loads[k] = at.some ? at.load(from, k) : typename Items::Loaded{}; });
}

template <class T, int Count, int Size>
FOGZO_DEVICE void widen(const T (&loads)[Count], Dtype dtype, float (&x)[Count][Size]) {
  unrolled<Count>([&](int k) { widen(loads[k], dtype, x[k]); });
}

template <bool Aligned, bool Hidden, bool Plain, class F>
FOGZO_DEVICE void walk_chunks(const Frame<Plain> &frame, int c, int chunks, F f) {
#pragma unroll 1
  for (; c < chunks; c += kThreads)
    f(Chunks<1, Aligned, Plain>{frame, Hidden ? opaque(c) : c, kThreads});
}

// Gives the block's elements to f: Count chunks a thread and turn where memory is aligned, else single chunks,
// and then single elements. Hidden: the compiler does not see a chunk's number, and multiplies it in each turn;
// else it keeps an address for each access, for which some kernels lack registers.
template <int Count, bool Hidden = true, bool Plain, class F>
FOGZO_DEVICE void walk(const Frame<Plain> &frame, F f) {
  const Part &part = frame.part;
  const int chunks = part.full_chunks();
  if constexpr (Count > 1) {
    const int wide = part.aligned() ? chunks : 0;
    int c = thread();
#pragma unroll 1
    for (; c + (Count - 1) * kThreads < wide; c += Count * kThreads)
      f(Chunks<Count, true, Plain>{frame, Hidden ? opaque(c) : c, kThreads});
    walk_chunks<false, Hidden>(frame, c, chunks, f);
  } else if (part.aligned()) {
    walk_chunks<true, Hidden>(frame, thread(), chunks, f);
  } else {
    walk_chunks<false, Hidden>(frame, thread(), chunks, f);
  }
  const int64_t end = part.end();
#pragma unroll 1
  for (int64_t j = part.rest() + thread(); j < end; j += kThreads)
    f(Element<Plain>{frame, j});
}

// ---- counters

// Counts the alphas that are not finite or not > 0, each in the block that holds its first element. A kernel
// does so at its end, when its loop has read them. Only a bad alpha costs an access to the counters.
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

} // namespace fogzo::cuda
