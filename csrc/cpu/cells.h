// Statistics of cells, the elements that share an alpha. Like tiles.h, which comes before it.

// Element i of a cell, or of a piece of one, goes to lane i % kSums, so that the order of additions is the same
// everywhere. Those of a short cell, for which so many lanes are too many, go to one.
template <Statistic S> struct Reduction {
  using Lane = std::conditional_t<S == Statistic::absmax, int32_t, double>;
  Lane lanes[kSums];
  int64_t count; // elements so far

  void clear() {
    for (Lane &lane : lanes)
      lane = 0;
    count = 0;
  }

  static void add(Lane &lane, float x) {
    if constexpr (S == Statistic::absmax) {
      const int32_t bits = int32_t(bits_of(x) & 0x7FFFFFFFu); // in the order of abs(x), and NaN above all
      lane = lane > bits ? lane : bits;
    } else if constexpr (S == Statistic::absmean) {
      lane += double(std::fabs(x));
    } else {
      static_assert(S == Statistic::rms || unknown<S>, "Reduction must know each statistic");
      lane += double(x) * double(x);
    }
  }

  void take(const float *x, int64_t n) {
    int64_t i = 0;
    for (; i < n && (count + i) % kSums; ++i)
      add(lanes[(count + i) % kSums], x[i]);
    Lane own[kSums];
    std::memcpy(own, lanes, sizeof own);
    for (; i + kSums <= n; i += kSums)
      for (int l = 0; l < kSums; ++l)
        add(own[l], x[i + l]);
    std::memcpy(lanes, own, sizeof own);
    for (int l = 0; i < n; ++i, ++l)
      add(lanes[l], x[i]);
    count += n;
  }

  double total() {
    for (int half = kSums / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) {
        const Lane a = lanes[l], b = lanes[l + half];
        lanes[l] = S == Statistic::absmax ? (a > b ? a : b) : a + b;
      }
    return double(lanes[0]);
  }
};

constexpr int64_t kShort = 2 * kSums; // elements of a cell

template <Statistic S, class Done>
void for_each_short_cell(const Item &item, int64_t begin, int64_t end, Done done) {
  float buffer[kTile];
  const int64_t length = item.scale_length, step = kTile / length * length;
  int64_t index = 0;
  for (int64_t start = begin; start < end; start += step) {
    const int64_t count = least(step, end - start);
    const float *x = load(item.latent, start, count, buffer);
    prefetch_tile(item.latent, start + step);
    for (int64_t first = 0; first < count; first += length) {
      typename Reduction<S>::Lane lane = 0;
      for (int64_t i = first; i < first + length; ++i)
        Reduction<S>::add(lane, x[i]);
      done(index++, double(lane));
    }
  }
}

// done(index, total) for each cell of the range: whole cells, or a piece of one.
template <Statistic S, class Done> void for_each_cell(const Item &item, int64_t begin, int64_t end, Done done) {
  if (item.scale_length < kShort)
    return for_each_short_cell<S>(item, begin, end, done);
  float buffer[kTile];
  const int64_t length = least(item.scale_length, end - begin);
  int64_t index = 0, left = length;
  Reduction<S> cell;
  cell.clear();
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *x = load(item.latent, start, count, buffer);
    prefetch_tile(item.latent, start + kTile);
    for (int64_t first = 0; first < count;) {
      const int64_t n = least(count - first, left);
      cell.take(x + first, n);
      first += n;
      left -= n;
      if (!left) {
        done(index++, cell.total());
        cell.clear();
        left = length;
      }
    }
  });
}

template <Statistic S>
void measure_range(const Item &item, const Measure &measure, int64_t begin, int64_t end) {
  float *alpha = static_cast<float *>(item.plus.data) + begin / item.scale_length;
  for_each_cell<S>(item, begin, end, [&](int64_t cell, double total) {
    alpha[cell] = alpha_of(statistic_of<S>(total, item.scale_length), measure);
  });
}

void measure_range(const Item &item, const Measure &measure, int64_t begin, int64_t end) {
  switch (measure.statistic) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Statistic::name:                                                                                        \
    return measure_range<Statistic::name>(item, measure, begin, end);
    FOGZO_STATISTICS(FOGZO_CASE)
#undef FOGZO_CASE
  }
}

double total_range(const Item &item, Statistic statistic, int64_t begin, int64_t end) {
  double found = 0;
  const auto keep = [&](int64_t, double total) { found = total; };
  switch (statistic) {
#define FOGZO_CASE(name, ...)                                                                                  \
  case Statistic::name:                                                                                        \
    for_each_cell<Statistic::name>(item, begin, end, keep);                                                    \
    break;
    FOGZO_STATISTICS(FOGZO_CASE)
#undef FOGZO_CASE
  }
  return found;
}
