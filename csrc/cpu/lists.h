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
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    if (t.numel)
      spans_.push_back({begin, begin + uintptr_t(t.bytes), written});
  }

  // In the order of their first bytes, each must begin behind what was written, and behind all if it is
  // written itself.
  void check() {
    sort();
    uintptr_t read = 0, written = 0; // the furthest ends
    for (const Span &span : spans_) {
      require(span.begin >= written && (!span.written || span.begin >= read), "overlap");
      uintptr_t &end = span.written ? written : read;
      end = std::max(end, span.end);
    }
  }

private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };

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

  // Alphas of quantizers: delta = r alpha is in 2^-100..2^100.
  void set_alphas(const Tensors &alphas, size_t count, int64_t r) {
    require(r == 1 || r == 2, "grid");
    set_cells(alphas, count, false);
    const float low = 0x1p-100f / float(r), high = 0x1p100f / float(r);
    for (const Tensor &alpha : alphas) {
      const float *values = alpha.at<float>();
      unsigned outside = 0;
      for (int64_t j = 0; j < alpha.numel; ++j)
        outside |= unsigned(!(values[j] >= low)) | unsigned(!(values[j] <= high)); // NaN too
      require(!outside, "alphas");
    }
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

// A kernel on all items, with its arguments.
template <class Function, class... Given>
void run(Function kernel, const std::vector<Operands> &items, const Given &...given) {
  for_each(make_ranges(items),
           [&](int64_t, const Range &range) { kernel(*range.item, given..., range.begin, range.end); });
}

} // namespace fogzo::cpu
