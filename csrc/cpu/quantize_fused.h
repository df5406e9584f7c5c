// Q in registers, 2 kWidth elements at a time as in fused.h. What is left of a part of a tensor that shares an
// alpha goes through the loops of tiles.h.

template <Dtype L, Dtype O, bool TABLE> struct Quantize {
  static constexpr bool PAIRS = in_pairs<L>(O);
  static constexpr int64_t kStep = 2 * kWidth;
  GridRange grid;
  F qmin, qmax, offset, codes;

  explicit Quantize(const GridRange &grid)
      : grid(grid), qmin(broadcast(grid.qmin)), qmax(broadcast(grid.qmax)), offset(broadcast(-grid.offset)),
        codes(codes_by_place(qmin)) {}

  // Whole steps from `begin` on; returns where the rest begins.
  int64_t run(const Item &item, const Scale &scale, int64_t begin, int64_t end) const {
    const void *const latent = item.latent.data;
    void *const out = item.plus.data;
    const F inv = broadcast(scale.inv), delta = broadcast(scale.delta), shift = delta * broadcast(grid.offset);
    const F table = TABLE ? table_of_values<O>(codes, delta, shift) : F{};
    const auto one = [&](F t) {
      const F clamped = smaller(larger(fused(t, inv, offset), qmin), qmax);
      if (TABLE)
        return pick(table, bits_of(clamped + 12582912.0f));
      const F code = rounded(clamped);
      return O == Dtype::int8 ? code : fused(code, delta, shift);
    };
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      F t0, t1;
      prefetch<L, 0>(latent, i);
      prefetch<O, 1>(out, i);
      load_two<L, PAIRS>(latent, i, t0, t1);
      store_two<O, PAIRS, TABLE ? Narrow::exact : Narrow::finite>(out, i, one(t0), one(t1));
    }
    return i;
  }
};

template <Dtype L, Dtype O, bool TABLE>
void quantize_vectors(const Item &item, const GridRange &grid, float r, int64_t begin, int64_t end) {
  const Quantize<L, O, TABLE> kernel(grid);
  for (int64_t i = begin; i < end;) {
    const int64_t group = i / item.scale_length, last = least(end, (group + 1) * item.scale_length);
    const int64_t rest = kernel.run(item, make_scale(item.alpha[group], r), i, last);
    if (rest < last)
      quantize_loops(item, grid, r, rest, last);
    i = last;
  }
}

void quantize_range(const Item &item, GridRange grid, float r, int64_t begin, int64_t end) {
  const bool table = fit_a_table(grid);
#define FOGZO_CASE(L, O)                                                                                       \
  if (item.latent.dtype == Dtype::L && item.plus.dtype == Dtype::O)                                            \
    return (table && Dtype::O != Dtype::int8                                                                   \
                ? quantize_vectors<Dtype::L, Dtype::O, Dtype::O != Dtype::int8>                                \
                : quantize_vectors<Dtype::L, Dtype::O, false>)(item, grid, r, begin, end);
  FOGZO_CASE(float32, float32)
  FOGZO_CASE(float32, bfloat16)
  FOGZO_CASE(float32, int8)
  FOGZO_CASE(bfloat16, bfloat16)
  FOGZO_CASE(bfloat16, int8)
#undef FOGZO_CASE
  quantize_loops(item, grid, r, begin, end);
}
