// The lists of an op: their checks, all that fogzo_kernels/ops refuses on the CPU, before anything is written;
// and the items that the kernels get. Cheap, as lists hold thousands of small tensors.
#pragma once

#include "arguments.h"
#include "kernels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

namespace fogzo::cpu {

// ---- one tensor

inline void check_tensor(const Tensor &t, unsigned types) {
  require(t.usable, "memory");
  require(types & bit(t.type), "dtype");
}

// The number in a 0-dim tensor.
template <class T> T &scalar(const Tensor &t, Type type) {
  check_tensor(t, bit(type));
  require(t.dim == 0, "shape");
  return *t.at<T>();
}

inline bool same_shape(const Tensor &a, const Tensor &b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

// One scale for the tensor, for each row (any leading dimensions, and ones behind them) or for each group of
// the last dimension. By shape: (1, 1024), meant for the columns of (32, 1024), has as many elements as 32
// groups in each row.
inline bool fits(const Tensor &alpha, const Tensor &t) {
  if (alpha.numel == 1 || t.numel == 0)
    return true;
  if (alpha.numel == 0)
    return false;
  const auto begins_alike = [&](int64_t dimensions) {
    return dimensions <= t.dim && std::equal(alpha.sizes, alpha.sizes + dimensions, t.sizes);
  };
  const int64_t last = alpha.dim - 1;
  if (alpha.dim == t.dim && begins_alike(last) && t.sizes[last] % alpha.sizes[last] == 0)
    return true;
  int64_t rows = alpha.dim;
  while (alpha.sizes[rows - 1] == 1) // ends, as there is more than one element
    --rows;
  return begins_alike(rows);
}

// ---- memory

// Finds tensors that share memory which an op writes.
class Memory {
public:
  void add(const Tensor &t, bool written) {
    if (t.numel)
      spans_.push_back(span_of(t, written));
  }

  // In the order of their first bytes, each must begin behind what was written, and behind all if it is
  // written itself. What is read and overlaps becomes one, so that all that is left lies apart.
  void check() {
    sort();
    uintptr_t read = 0, written = 0; // the furthest ends
    size_t count = 0;
    for (const Span &span : spans_) {
      require(span.begin >= written && (!span.written || span.begin >= read), "overlap");
      (span.written ? written : read) = std::max(span.written ? written : read, span.end);
      if (count && span.begin < spans_[count - 1].end)
        spans_[count - 1].end = std::max(spans_[count - 1].end, span.end);
      else
        spans_[count++] = span;
    }
    spans_.resize(count);
  }

  // One more, which is in no list, after check().
  void check(const Tensor &t, bool written) const {
    const Span given = span_of(t, written);
    auto span = std::upper_bound(spans_.begin(), spans_.end(), given.begin,
                                 [](uintptr_t begin, const Span &other) { return begin < other.end; });
    for (; t.numel && span != spans_.end() && span->begin < given.end; ++span)
      require(!written && !span->written, "overlap");
  }

private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };

  static Span span_of(const Tensor &t, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    return {begin, begin + uintptr_t(t.bytes), written};
  }

  // By begin. Thousands of spans by their digits, which takes a third of what comparisons take.
  void sort() {
    const auto before = [](const Span &a, const Span &b) { return a.begin < b.begin; };
    constexpr size_t kFew = 256;
    constexpr int kBits = 11, kDigits = 1 << kBits;
    if (spans_.size() < kFew)
      return std::sort(spans_.begin(), spans_.end(), before);
    const auto [least, most] = std::minmax_element(spans_.begin(), spans_.end(), before);
    const uintptr_t origin = least->begin, range = most->begin - origin;
    std::vector<Span> other(spans_.size());
    for (int shift = 0; shift < 64 && range >> shift; shift += kBits) {
      size_t place[kDigits + 1] = {};
      for (const Span &span : spans_)
        ++place[((span.begin - origin) >> shift & (kDigits - 1)) + 1];
      for (int digit = 0; digit < kDigits; ++digit)
        place[digit + 1] += place[digit];
      for (const Span &span : spans_)
        other[place[(span.begin - origin) >> shift & (kDigits - 1)]++] = span;
      spans_.swap(other);
    }
  }

  std::vector<Span> spans_;
};

// ---- lists

// A list for the first `count` of `like`: of their shapes and of one dtype.
inline void check_list(const Tensors &list, unsigned types, const Tensors &like, size_t count) {
  require(list.size() == count, "length");
  for (size_t i = 0; i < count; ++i) {
    check_tensor(list[i], types);
    require(list[i].type == list[0].type, "dtype");
    require(same_shape(list[i], like[i]), "shape");
  }
}

static_assert(kRange % kBlocks[std::size(kBlocks) - 1] == 0, "a range has whole blocks of the transform");

// Checks an op's lists, and makes of them the items that kernels get, one for each tensor of the first list.
// Nothing here depends on what the tensors hold.
class Lists {
public:
  std::vector<Operands> items;
  Memory memory;

  explicit Lists(const Tensors &first) : items(first.size()), first_(first) {
    for (size_t i = 0; i < items.size(); ++i)
      items[i].numel = first[i].numel;
  }

  void read(Span Operands::*part, const Tensors &list, unsigned types) {
    add(part, list, types, items.size());
    add_memory(list, false);
  }

  // Reads tensors. Each may share its memory with the tensor of `written` that has the same index.
  void read_in_place(Span Operands::*part, const Tensors &list, unsigned types, const Tensors &written) {
    add(part, list, types, items.size());
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i].data != written[i].data || list[i].bytes != written[i].bytes)
        memory.add(list[i], false);
  }

  void write(Span Operands::*part, const Tensors &list, unsigned types) {
    write(part, list, types, items.size());
  }

  // Of the first `count` items.
  void write(Span Operands::*part, const Tensors &list, unsigned types, size_t count) {
    add(part, list, types, count);
    add_memory(list, true);
  }

  // One alpha, whatever it holds, for the cells of each of the first `count` items.
  void set_cells(const Tensors &alphas, size_t count, bool written) {
    require(alphas.size() == count, "length");
    for (size_t i = 0; i < count; ++i) {
      check_tensor(alphas[i], bit(Type::float32));
      require(fits(alphas[i], first_[i]), "shape");
      items[i].alpha = alphas[i].at<const float>();
      items[i].scale_length = std::max<int64_t>(1, items[i].numel / std::max<int64_t>(1, alphas[i].numel));
    }
    add_memory(alphas, written);
  }

  // The transform of the first items, or 0: whole blocks, each with one alpha.
  void set_transform(int64_t given, size_t count) {
    if (given == 0)
      return;
    const int block = block_of(given);
    for (size_t i = 0; i < count; ++i) {
      const Tensor &t = first_[i];
      require(t.dim && t.sizes[t.dim - 1] % block == 0, "block");
      require(!items[i].alpha || t.numel == 0 || items[i].scale_length % block == 0, "block");
      items[i].block = block;
    }
  }

private:
  void add(Span Operands::*part, const Tensors &list, unsigned types, size_t count) {
    check_list(list, types, first_, count);
    for (size_t i = 0; i < count; ++i)
      items[i].*part = {list[i].data, list[i].dtype()};
  }

  void add_memory(const Tensors &list, bool written) {
    for (const Tensor &t : list)
      memory.add(t, written);
  }

  const Tensors &first_;
};

// Whether an alpha of a quantizer is usable: delta = r alpha is in 2^-100..2^100.
inline bool in_range(const Tensor &alpha, int64_t r) {
  const float low = 0x1p-100f / float(r), high = 0x1p100f / float(r);
  const float *const values = alpha.at<const float>();
  unsigned outside = 0;
  for (int64_t j = 0; j < alpha.numel; ++j)
    outside |= unsigned(!(values[j] >= low)) | unsigned(!(values[j] <= high)); // NaN too
  return !outside;
}

inline void check_alphas(const Tensors &alphas, int64_t r) {
  require(r == 1 || r == 2, "grid");
  for (const Tensor &alpha : alphas)
    require(in_range(alpha, r), "alphas");
}

// The lists of a call, which `build` fills and checks. Where Python prepared them all, they are kept by their
// generations and `key`: what `build` depends on beside the tensors.
template <class Build>
std::shared_ptr<const Lists> lists_of(const Arguments &a, const Tensors &first, Ints key, Build build) {
  constexpr size_t kKept = 32;
  static std::mutex mutex; // for each op, as the type of its `build` is its own
  static auto &kept = *new std::vector<std::pair<Ints, std::shared_ptr<const Lists>>>; // the last one first
  const Ints *generations = a.generations();
  if (generations) {
    key.insert(key.end(), generations->begin(), generations->end());
    const std::lock_guard lock(mutex);
    const auto known =
        std::find_if(kept.begin(), kept.end(), [&](const auto &entry) { return entry.first == key; });
    if (known != kept.end()) {
      std::rotate(kept.begin(), known, known + 1);
      return kept.front().second;
    }
  }
  const auto lists = std::make_shared<Lists>(first);
  build(*lists);
  lists->memory.check();
  if (generations) {
    const std::lock_guard lock(mutex);
    kept.emplace(kept.begin(), std::move(key), lists);
    kept.resize(std::min(kept.size(), kKept));
  }
  return lists;
}

// ---- ranges

struct Range {
  const Operands *item;
  int64_t begin, end;
};

// Of at most kRange elements.
inline std::vector<Range> make_ranges(const std::vector<Operands> &items) {
  std::vector<Range> ranges;
  ranges.reserve(items.size());
  for (const Operands &item : items)
    for (int64_t begin = 0; begin < item.numel; begin += kRange)
      ranges.push_back({&item, begin, std::min(item.numel, begin + kRange)});
  return ranges;
}

// body(index, range) over all of them, in parallel
template <class Body> void for_each(const std::vector<Range> &ranges, Body body) {
  torch::stable::parallel_for(0, int64_t(ranges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i, ranges[i]);
  });
}

// A kernel on all items, with an argument of each item's own: `set` changes a copy of `common` for item i.
template <class Function, class Argument, class Set>
void run_each(Function kernel, const std::vector<Operands> &items, const Argument &common, Set set) {
  for_each(make_ranges(items), [&](int64_t, const Range &range) {
    Argument own = common;
    set(own, size_t(range.item - items.data()));
    kernel(*range.item, own, range.begin, range.end);
  });
}

// A kernel on all items, with its arguments.
template <class Function, class... Given>
void run(Function kernel, const std::vector<Operands> &items, const Given &...given) {
  for_each(make_ranges(items),
           [&](int64_t, const Range &range) { kernel(*range.item, given..., range.begin, range.end); });
}

// The gradients of alphas that several ranges share, added in the order of the ranges.
inline void add_cuts(const std::vector<Range> &ranges, const std::vector<Cut> &cuts) {
  double sum = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto [item, begin, end] = ranges[i];
    const int64_t length = item->scale_length, first = begin / length, last = (end - 1) / length;
    if (begin % length) { // the alpha of its first element began before
      sum += cuts[i].before;
      if ((first + 1) * length <= end)
        item->alpha_grad[first] = float(item->factor * sum);
    }
    if (last * length >= begin && end % length)
      sum = cuts[i].behind;
  }
}

// The straight-through backward, with the gradients of alphas.
inline void run_learned(const std::vector<Operands> &items, StraightThrough what, GridRange grid, float r) {
  const Kernels &best = kernels();
  const std::vector<Range> ranges = make_ranges(items);
  std::vector<Cut> cuts(ranges.size());
  for_each(ranges, [&](int64_t i, const Range &range) {
    cuts[i] = best.learned(*range.item, what, grid, r, range.begin, range.end);
  });
  add_cuts(ranges, cuts);
}

} // namespace fogzo::cpu
