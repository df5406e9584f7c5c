// Cuts ranges for the kernels on vectors. A run is whole batches with one scale and consecutive chunks. A
// single batch has a scale and a number for each of its chunks: short rows and groups whose lengths are
// multiples of 8 need them, and the ends of ranges.
#pragma once

#include "noise.h"

#if FOGZO_ISA
namespace fogzo::cpu {
namespace {

constexpr int64_t kAhead = 4096; // bytes; the hardware's own prefetching stops at each page

// Two vectors, some bytes after element i. Always inlined: GCC drops calls of a function that only prefetches.
template <Dtype T, int WRITE>
inline __attribute__((always_inline)) void prefetch(const void *data, int64_t i, int64_t bytes = kAhead) {
  const char *ahead = static_cast<const char *>(data) + i * size_of(T) + bytes;
  for (int64_t line = 0; line < 2 * kWidth * size_of(T); line += 64)
    __builtin_prefetch(ahead + line, WRITE);
}

struct Run {
  int64_t begin, end; // local elements: whole batches
  uint64_t chunk;     // of the first one; the upper half of all of them
  Scale scale;

  uint64_t chunk_at(int64_t i) const { return chunk + uint64_t(i - begin) / 8; }
  // How many vectors of halves to draw at element i.
  int64_t drawn_at(int64_t i, int64_t most) const { return least(most, (end - i) / (2 * kWidth)); }
};

struct Batch {
  int64_t begin, end; // local elements, before which the first `skip` elements of the batch lie
  int64_t skip;
  uint64_t chunk[kGroup];
  float delta[kGroup];

  bool full() const { return end - begin == kBatch; }
};

// Walks over the elements of a range, with their names and scales.
struct Walk {
  const Operands &item;
  float r;
  int64_t at, column, e, group, left; // e: of element `at`; left: elements up to the group's end

  Walk(const Operands &item, float r, int64_t begin)
      : item(item), r(r), at(begin), column(begin % item.layout.inner),
        e(item.layout.offset + begin / item.layout.inner * item.layout.stride + column),
        group(begin / item.scale_length), left(item.scale_length - begin % item.scale_length) {}

  // the next end of a row, a group or the range
  int64_t same_until(int64_t end) const {
    return least(least(end, at + item.layout.inner - column), at + left);
  }

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

  // The batch up to `stop`: whole chunks, or consecutive elements with one scale.
  Batch batch_until(int64_t stop) {
    Batch batch;
    batch.begin = at, batch.end = stop, batch.skip = e & 7;
    int i = 0;
    while (at < stop) {
      const int64_t count = same_until(stop) - at;
      const float delta = item.alpha[group] * r;
      for (int64_t chunk = e >> 3; chunk <= (e + count - 1) >> 3; ++chunk, ++i)
        batch.chunk[i] = uint64_t(chunk), batch.delta[i] = delta;
      advance(count);
    }
    for (; i < kGroup; ++i)
      batch.chunk[i] = 0, batch.delta[i] = 1.0f; // of elements that are not there
    return batch;
  }
};

// The values of the elements of vector k of a batch, from one value for each chunk.
template <bool PAIRS> inline F spread(F chunks, int k) {
  return pick(chunks, (lane_numbers() * (PAIRS ? 2u : 1u) + uint32_t(k * kWidth)) >> 3);
}

inline bool in_chunks(const Operands &item) {
  const Layout &l = item.layout;
  return l.offset % 8 == 0 && (l.inner >= item.numel || (l.inner % 8 == 0 && l.stride % 8 == 0)) &&
         (item.scale_length >= item.numel || item.scale_length % 8 == 0);
}

// Whether rows or groups are so short that tiles are faster than the batches at their ends.
inline bool better_by_tiles(const Operands &item) {
  return !in_chunks(item) && least(item.layout.inner, item.scale_length) < 4 * kBatch;
}

// Room for an operand of a batch that does not fill it. Pointers to it count elements as the tensor does.
template <Dtype T> struct Buffer {
  alignas(64) char bytes[kBatch * size_of(T)];

  void *at(const Batch &batch) { return span_from(bytes, T, batch.begin - batch.skip).data; }
  void *filled(const void *data, const Batch &batch) {
    std::memset(bytes, 0, sizeof bytes);
    std::memcpy(bytes + batch.skip * size_of(T), static_cast<const char *>(data) + batch.begin * size_of(T),
                (batch.end - batch.begin) * size_of(T));
    return at(batch);
  }
  void write(void *data, const Batch &batch) const {
    std::memcpy(static_cast<char *>(data) + batch.begin * size_of(T), bytes + batch.skip * size_of(T),
                (batch.end - batch.begin) * size_of(T));
  }
};

// Cuts a range into runs for on_run(run) and batches for on_batch(batch).
template <class OnRun, class OnBatch>
void for_each_run(const Operands &item, float r, int64_t begin, int64_t end, OnRun on_run, OnBatch on_batch) {
  const bool chunked = in_chunks(item);
  for (Walk walk(item, r, begin); walk.at < end;) {
    const int64_t same = walk.same_until(end), skip = walk.e & 7;
    const int64_t whole = skip ? 0 : least(same - walk.at, same_half_from(walk.e)) / kBatch * kBatch;
    if (whole) {
      on_run(Run{walk.at, walk.at + whole, uint64_t(walk.e) >> 3, make_scale(item.alpha[walk.group], r)});
      walk.advance(whole);
      continue;
    }
    on_batch(walk.batch_until(chunked ? least(end, walk.at + kBatch) : least(same, walk.at + kBatch - skip)));
  }
}

// Operands of dtypes that have kernels of their own, in the order of an op's operands.
template <Dtype... T> struct Dtypes {
  template <class... Given> static bool are(Given... given) { return ((given == T) && ...); }
};

// body(dtypes) for the first of LIST that is given; false where there is none
template <class... List, class Body, class... Given> bool with_dtypes(Body body, Given... given) {
  return ((List::are(given...) && (body(List()), true)) || ...);
}

} // namespace
} // namespace fogzo::cpu
#endif
