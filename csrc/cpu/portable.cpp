// Portable CPU kernels. Ranges are cut into tiles that stay in the first-level cache; a tile is
// converted to float32, worked on, and converted back.
#include "kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

namespace fogzo::cpu {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int64_t kTile = 1024;
constexpr int64_t kLanes = 16; // Philox calls in flight

template <class T> void widen(const void *data, int64_t begin, int64_t count, float *out) {
  const T *in = static_cast<const T *>(data) + begin;
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<float>(in[i]);
}

// A tile as float32: the tensor's own memory when it is float32, else `buffer`.
const float *load(const Span &span, int64_t begin, int64_t count, float *buffer) {
  switch (span.dtype) {
  case Dtype::bfloat16:
    widen<BFloat16>(span.data, begin, count, buffer);
    return buffer;
  case Dtype::float16:
    widen<Half>(span.data, begin, count, buffer);
    return buffer;
  default:
    return static_cast<const float *>(span.data) + begin;
  }
}

template <class T> void narrow(const float *in, void *data, int64_t begin, int64_t count) {
  T *out = static_cast<T *>(data) + begin;
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<T>(in[i]);
}

void store(const float *in, const Span &span, int64_t begin, int64_t count) {
  switch (span.dtype) {
  case Dtype::float32:
    std::memmove(static_cast<float *>(span.data) + begin, in, count * sizeof(float));
    return;
  case Dtype::bfloat16:
    return narrow<BFloat16>(in, span.data, begin, count);
  case Dtype::float16:
    return narrow<Half>(in, span.data, begin, count);
  case Dtype::int8:
    return narrow<int8_t>(in, span.data, begin, count);
  }
}

// Words of kLanes consecutive chunks; 64-bit lanes, so that one multiply yields both halves.
void philox_lanes(const Names &names, uint64_t chunk, uint32_t *words) {
  uint64_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
  uint32_t k0 = uint32_t(names.seed), k1 = uint32_t(names.seed >> 32);
  for (int64_t l = 0; l < kLanes; ++l) {
    x0[l] = uint32_t(chunk + l);
    x1[l] = (chunk + l) >> 32 | names.direction << 16;
    x2[l] = names.step;
    x3[l] = names.tensor_id;
  }
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
    for (int64_t l = 0; l < kLanes; ++l) {
      const uint64_t p0 = (x0[l] & 0xFFFFFFFFu) * kPhiloxM0, p1 = (x2[l] & 0xFFFFFFFFu) * kPhiloxM1;
      x0[l] = (p1 >> 32) ^ (x1[l] & 0xFFFFFFFFu) ^ k0;
      x2[l] = (p0 >> 32) ^ (x3[l] & 0xFFFFFFFFu) ^ k1;
      x1[l] = p1;
      x3[l] = p0;
    }
  for (int64_t l = 0; l < kLanes; ++l) {
    words[4 * l] = uint32_t(x0[l]);
    words[4 * l + 1] = uint32_t(x1[l]);
    words[4 * l + 2] = uint32_t(x2[l]);
    words[4 * l + 3] = uint32_t(x3[l]);
  }
}

// m of the consecutive elements e .. e + count - 1, count <= kTile
template <Distribution D> void noise_run(const Names &names, uint64_t e, int64_t count, float *m) {
  uint32_t words[4 * kLanes];
  float buffer[8 * kLanes];
  for (int64_t done = -int64_t(e & 7); done < count; done += 8 * kLanes) {
    philox_lanes(names, (e + done) >> 3, words);
    for (int64_t w = 0; w < 4 * kLanes; ++w) {
      const Pair pair = noise_of_word<D>(words[w]);
      buffer[2 * w] = pair.even;
      buffer[2 * w + 1] = pair.odd;
    }
    const int64_t first = std::max<int64_t>(0, -done), last = std::min(count - done, 8 * kLanes);
    std::memcpy(m + done + first, buffer + first, (last - first) * sizeof(float));
  }
}

void noise_run(const Noise &noise, uint64_t e, int64_t count, float *m) {
  switch (noise.distribution) {
  case Distribution::uniform:
    return noise_run<Distribution::uniform>(noise.names, e, count, m);
  case Distribution::rademacher:
    return noise_run<Distribution::rademacher>(noise.names, e, count, m);
  case Distribution::triangular:
    return noise_run<Distribution::triangular>(noise.names, e, count, m);
  case Distribution::logistic:
    return noise_run<Distribution::logistic>(noise.names, e, count, m);
  case Distribution::gaussian:
    return noise_run<Distribution::gaussian>(noise.names, e, count, m);
  }
}

// m of local elements begin .. begin + count - 1 of a shard
void noise_tile(const Noise &noise, const Layout &layout, int64_t begin, int64_t count, float *m) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (begin + done) / layout.inner, column = (begin + done) % layout.inner;
    const int64_t run = std::min(count - done, layout.inner - column);
    noise_run(noise, uint64_t(layout.offset + row * layout.stride + column), run, m + done);
    done += run;
  }
}

// body(first, last, scale) for each part of a tile that shares one alpha; indices within the tile
template <class Body> void for_each_scale(const Item &item, float r, int64_t begin, int64_t count, Body body) {
  for (int64_t done = 0; done < count;) {
    const int64_t group = (begin + done) / item.scale_length;
    const int64_t last = std::min(count, (group + 1) * item.scale_length - begin);
    body(done, last, make_scale(item.alpha[group], r));
    done = last;
  }
}

template <class Body> void for_each_tile(int64_t begin, int64_t end, Body body) {
  for (int64_t start = begin; start < end; start += kTile)
    body(start, std::min(kTile, end - start));
}

} // namespace

void noise_range(const Noise &noise, const Layout &layout, float scale, float *out, int64_t begin,
                 int64_t end) {
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    noise_tile(noise, layout, start, count, out + start);
    for (int64_t i = start; i < start + count; ++i)
      out[i] *= scale;
  });
}

double sumsq_range(const Item &item, float r, int64_t begin, int64_t end) {
  float buffer[kTile];
  double sum = 0;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *g = load(item.grad, start, count, buffer);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
      for (int64_t i = first; i < last; ++i) {
        const double h = double(g[i]) * double(scale.delta);
        sum += h * h;
      }
    });
  });
  return sum;
}

void perturb_range(const Item &item, const Perturbation &p, int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], m[kTile], plus[kTile], minus[kTile];
  Noise noise = p.noise;
  noise.names.tensor_id = item.tensor_id;
  const auto write = [&](const Span &out, float *values, int64_t start, int64_t count) {
    if (!out.data)
      return;
    if (out.dtype != Dtype::int8) // int8 outputs hold the code itself
      for_each_scale(item, p.r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
        for (int64_t i = first; i < last; ++i)
          values[i] = value_of(values[i], scale, p.grid);
      });
    store(values, out, start, count);
  };
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent);
    const float *g = load(item.grad, start, count, grad);
    noise_tile(noise, item.layout, start, count, m);
    for_each_scale(item, p.r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
      const float gam = p.a * scale.delta;
      for (int64_t i = first; i < last; ++i) {
        const float v = direction_of(gam, g[i], p.b, m[i]), z = position_of(t[i], scale, p.grid);
        plus[i] = code_of(std::fma(p.epsilon, v, z), p.grid);
        minus[i] = code_of(std::fma(-p.epsilon, v, z), p.grid);
      }
    });
    write(item.plus, plus, start, count);
    write(item.minus, minus, start, count);
  });
}

namespace {

// G of a tile into out
void estimate_tile(const Item &item, const Estimate &e, const float *g, int64_t start, int64_t count,
                   float *out) {
  float m[kTile], acc[kTile];
  Noise noise = e.noise;
  noise.names.tensor_id = item.tensor_id;
  std::fill_n(acc, count, 0.0f);
  for (int64_t direction = 0; direction < e.directions; ++direction) {
    noise.names.direction = uint32_t(direction);
    noise_tile(noise, item.layout, start, count, m);
    for (int64_t i = 0; i < count; ++i)
      acc[i] = std::fma(e.B[direction], m[i], acc[i]);
  }
  for_each_scale(item, e.r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
    for (int64_t i = first; i < last; ++i)
      out[i] = estimate_of(e.A, g[i], scale.inv, acc[i]);
  });
}

// the optimizer's step of a tile, in place
void step_tile(const Item &item, const Update &update, const float *G, int64_t start, int64_t count) {
  float buffer[kTile], out[kTile], none = 0;
  const Span &weight = item.master.data ? item.master : item.latent;
  const float *theta = load(weight, start, count, buffer);
  float *first = static_cast<float *>(item.first.data), *second = static_cast<float *>(item.second.data);
  for (int64_t i = 0; i < count; ++i)
    out[i] =
        updated(update, theta[i], G[i], first ? first[start + i] : none, second ? second[start + i] : none);
  store(out, weight, start, count);
  if (item.master.data)
    store(out, item.latent, start, count);
}

} // namespace

void estimate_range(const Item &item, const Estimate &e, int64_t begin, int64_t end) {
  float grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    estimate_tile(item, e, load(item.grad, start, count, grad), start, count, out);
    store(out, item.grad, start, count);
  });
}

void update_range(const Item &item, const Tail &tail, int64_t begin, int64_t end) {
  float grad[kTile], out[kTile];
  const bool drawn = item.alpha && tail.estimate.directions;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    if (!tail.skip) {
      const float *g = load(item.grad, start, count, grad);
      if (drawn)
        estimate_tile(item, tail.estimate, g, start, count, out);
      step_tile(item, tail.update, drawn ? out : g, start, count);
    }
    if (item.plus.data) // while the tile is in the cache
      quantize_range(item, tail.grid, tail.estimate.r, start, start + count);
  });
}

void quantize_range(const Item &item, const GridRange &grid, float r, int64_t begin, int64_t end) {
  float latent[kTile], out[kTile];
  const bool codes = item.plus.dtype == Dtype::int8;
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
      for (int64_t i = first; i < last; ++i) {
        const float code = code_of(position_of(t[i], scale, grid), grid);
        out[i] = codes ? code : value_of(code, scale, grid);
      }
    });
    store(out, item.plus, start, count);
  });
}

void straight_through_range(const Item &item, StraightThrough kind, const GridRange &grid, float r,
                            int64_t begin, int64_t end) {
  float latent[kTile], grad[kTile], out[kTile];
  for_each_tile(begin, end, [&](int64_t start, int64_t count) {
    const float *t = load(item.latent, start, count, latent);
    const float *g = load(item.grad, start, count, grad);
    for_each_scale(item, r, start, count, [&](int64_t first, int64_t last, const Scale &scale) {
      for (int64_t i = first; i < last; ++i)
        out[i] = g[i] * derivative_of(kind, t[i], scale, grid, r);
    });
    store(out, item.plus, start, count);
  });
}

} // namespace fogzo::cpu
