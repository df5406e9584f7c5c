// Q of latents (docs/contract.md, section 1), of all ops that write it.
#pragma once

#include "hadamard.h"
#include "runs.h"

namespace fogzo::cpu {
namespace {

void quantize_loops(const Operands &item, GridRange grid, float r, int64_t begin, int64_t end) {
  float latent[kTile], out[kTile];
  const bool codes = item.plus.dtype == Dtype::int8; // holds the code itself
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

#if FOGZO_ISA
// The constants that the elements of a vector share.
struct VectorScale : ScaleOf<F> {
  F shift; // delta * offset
  F table; // of TABLE: Q of every code, as it is stored
};

inline bool fit_a_table(const GridRange &grid) { return grid.qmax - grid.qmin < float(kWidth); }

template <Dtype O, bool TABLE> struct Quantizer {
  static constexpr Narrow kNarrow = TABLE ? Narrow::exact : Narrow::finite;
  GridOf<F> grid;

  explicit Quantizer(const GridRange &given)
      : grid{broadcast(given.qmin), broadcast(given.qmax), broadcast(given.offset)} {}

  VectorScale scale(F delta, F inv) const {
    const F shift = delta * grid.offset;
    if (!TABLE)
      return {{delta, inv}, shift, F{}};
    const F values = fused(codes_by_place(), delta, shift);
    return {{delta, inv},
            shift,
            O == Dtype::bfloat16 ? float_of(narrowed<Narrow::finite>(values) & 0xFFFF0000u) : values};
  }

  F operator()(F y, const VectorScale &s) const {
    if (TABLE) // the sum's low bits are the code, half to even
      return pick(s.table, bits_of(clamped_of(y, grid) + 12582912.0f));
    const F code = code_of(y, grid);
    return O == Dtype::int8 ? code : fused(code, s.delta, s.shift); // the bits of delta * (code + offset)
  }

private:
  // The low bits of a code are its place: code = place - kWidth k, qmin <= code < qmin + kWidth.
  F codes_by_place() const {
    constexpr float half = 0.5f * (kWidth - 1) / kWidth; // k and a fraction of 0 .. 2 half: without half, k
    const F place = float_from(lane_numbers());
    const F k = rounded(fused(place - grid.qmin, broadcast(1.0f / kWidth), broadcast(-half)));
    return fused(k, broadcast(-float(kWidth)), place);
  }
};

template <Dtype L, Dtype O, bool TABLE>
void quantize_vectors(const Operands &item, const GridRange &grid, float r, int64_t begin, int64_t end) {
  constexpr bool PAIRS = in_pairs<L>(O);
  const Quantizer<O, TABLE> quantized(grid);
  const void *const latent = item.latent.data;
  void *const out = item.plus.data;
  for (int64_t i = begin; i < end;) {
    const int64_t group = i / item.scale_length, last = least(end, (group + 1) * item.scale_length);
    const Scale scale = make_scale(item.alpha[group], r);
    const VectorScale s = quantized.scale(broadcast(scale.delta), broadcast(scale.inv));
    for (; i + 2 * kWidth <= last; i += 2 * kWidth) {
      prefetch<L, 0>(latent, i);
      prefetch<O, 1>(out, i);
      const Two t = load_two<L, PAIRS>(latent, i);
      store_two<O, PAIRS, quantized.kNarrow>(out, i, quantized(position_of(t.first, s, quantized.grid), s),
                                             quantized(position_of(t.last, s, quantized.grid), s));
    }
    if (i < last)
      quantize_loops(item, grid, r, i, last);
    i = last;
  }
}

template <Dtype L, Dtype O> auto quantize_of(Dtypes<L, O>, const GridRange &grid) {
  return O != Dtype::int8 && fit_a_table(grid) ? quantize_vectors<L, O, O != Dtype::int8>
                                               : quantize_vectors<L, O, false>;
}
#endif

void quantize_range(const Operands &item, GridRange grid, float r, int64_t begin, int64_t end) {
  if (item.block)
    return for_each_rotated_tile(item, begin, end, [&](const Operands &tile, int64_t start, int64_t stop) {
      quantize_range(tile, grid, r, start, stop);
    });
#if FOGZO_ISA
  constexpr Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, int8 = Dtype::int8;
  if (with_dtypes<Dtypes<f32, f32>, Dtypes<f32, bf16>, Dtypes<f32, int8>, Dtypes<bf16, bf16>,
                  Dtypes<bf16, int8>>(
          [&](auto dtypes) { quantize_of(dtypes, grid)(item, grid, r, begin, end); }, item.latent.dtype,
          item.plus.dtype))
    return;
#endif
  quantize_loops(item, grid, r, begin, end);
}

} // namespace
} // namespace fogzo::cpu
