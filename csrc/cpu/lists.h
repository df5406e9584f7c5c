// Checks of tensors and of lists that go tensor by tensor: all that fogzo_kernels/ops refuses on the
// CPU, before anything is written. Cheap: lists hold thousands of small tensors.
#pragma once

#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <ostream>

namespace fogzo::cpu {

// ---- text of errors

inline const char *text_of(Type type) {
  static constexpr const char *names[] = {FOGZO_DTYPES(FOGZO_TEXT_OF) "float64", "int64", "another dtype"};
  return names[int(type)];
}

struct Types {
  unsigned bits;
};

inline std::ostream &operator<<(std::ostream &out, Types types) {
  bool first = true;
  for (int i = 0; i < int(Type::other); ++i)
    if (types.bits >> i & 1) {
      out << (first ? "" : " or ") << text_of(Type(i));
      first = false;
    }
  return out;
}

struct Shape {
  const Tensor &of;
  const char *last = nullptr; // stands for the last size
};

inline std::ostream &operator<<(std::ostream &out, const Shape &shape) {
  out << "(";
  const int64_t named = shape.last ? shape.of.dim - 1 : shape.of.dim;
  for (int64_t i = 0; i < named; ++i)
    out << (i ? ", " : "") << shape.of.sizes[i];
  if (shape.last)
    out << (named ? ", " : "") << shape.last;
  return out << (shape.of.dim == 1 ? ",)" : ")");
}

// What alphas fit a tensor.
struct Fitting {
  const Tensor &to;
};

inline std::ostream &operator<<(std::ostream &out, const Fitting &fitting) {
  const Tensor &t = fitting.to;
  out << "one element";
  if (t.dim > 1)
    out << ", one per row, shape " << Shape{t, "1"} << ",";
  if (t.dim > 0)
    out << " or one per group of the last dimension, shape " << Shape{t, "groups"} << ",";
  return out << " for a tensor of shape " << Shape{t};
}

// ---- one tensor

[[noreturn]] inline void refuse_fault(const Tensor &t, const Name &name) {
  int64_t held = 0, offset = 0;
  switch (t.fault) {
  case Fault::none:
    break;
  case Fault::device:
    refuse(name, " must be a tensor on the CPU");
  case Fault::layout:
    refuse(name, " must have the strided layout");
  case Fault::strides:
    refuse(name, " must be contiguous");
  case Fault::storage:
    aoti_torch_get_storage_size(t.handle.get(), &held);
    aoti_torch_get_storage_offset(t.handle.get(), &offset);
    refuse(name, " must have a storage of at least ", (offset + t.numel) * t.size, " bytes, got ", held);
  case Fault::alignment:
    refuse(name, " must be aligned to its elements of ", t.size, " bytes");
  }
  throw std::logic_error("a tensor without a fault was refused");
}

inline void check_tensor(const Tensor &t, const Name &name, unsigned types) {
  FOGZO_CHECK(types & bit(t.type), name, " must be ", Types{types}, ", got ", text_of(t.type));
  if (t.fault != Fault::none)
    refuse_fault(t, name);
}

inline void check_scalar(const Tensor &t, const Name &name, Type type) {
  FOGZO_CHECK(t.type == type && t.dim == 0, name, " must be a 0-dim ", text_of(type), " tensor, got ",
              text_of(t.type), " ", Shape{t});
  check_tensor(t, name, bit(type));
}

// The number in a 0-dim tensor.
template <class T> T scalar(const Tensor &t, const Name &name, Type type) {
  check_scalar(t, name, type);
  return *t.at<const T>();
}

// ---- lists

inline bool same_shape(const Tensor &a, const Tensor &b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

inline void check_length(const Tensors &list, size_t length, const char *name) {
  FOGZO_CHECK(list.size() == length, name, " must have ", length, " tensors, got ", list.size());
}

// A list of contiguous tensors of one dtype.
inline void check_list(const Tensors &list, const char *name, unsigned types) {
  for (size_t i = 0; i < list.size(); ++i) {
    check_tensor(list[i], {name, i}, types);
    FOGZO_CHECK(list[i].type == list[0].type, Name(name, i), " must have the dtype of ", name, "[0], ",
                text_of(list[0].type), ", got ", text_of(list[i].type));
  }
}

// Such a list, of the shapes of the first `count` of `like`.
inline void check_list_like(const Tensors &list, const char *name, unsigned types, const Tensors &like,
                            size_t count) {
  check_length(list, count, name);
  check_list(list, name, types);
  for (size_t i = 0; i < count; ++i)
    FOGZO_CHECK(same_shape(list[i], like[i]), Name(name, i), " must have shape ", Shape{like[i]}, ", got ",
                Shape{list[i]});
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

// Lists of alphas of the right shapes, for the first of `like`, whatever they hold.
inline void check_shapes_of_alphas(const Tensors &alphas, const Tensors &like) {
  check_list(alphas, "alphas", bit(Type::float32));
  for (size_t i = 0; i < alphas.size(); ++i)
    FOGZO_CHECK(fits(alphas[i], like[i]), Name("alphas", i), " must have ", Fitting{like[i]}, ", got shape ",
                Shape{alphas[i]});
}

// The same, of delta = r alpha in 2^-100..2^100.
inline void check_alphas(const Tensors &alphas, const Tensors &like, int64_t r) {
  check_shapes_of_alphas(alphas, like);
  const float low = 0x1p-100f / float(r), high = 0x1p100f / float(r);
  for (size_t i = 0; i < alphas.size(); ++i) {
    const float *values = alphas[i].at<float>();
    unsigned outside = 0;
    for (int64_t j = 0; j < alphas[i].numel; ++j)
      outside |= unsigned(!(values[j] >= low)) | unsigned(!(values[j] <= high)); // NaN too
    if (!outside)
      continue;
    const float *first =
        std::find_if(values, values + alphas[i].numel, [&](float x) { return !(x >= low && x <= high); });
    refuse(Name("alphas", i), " must be finite, > 0 and in ", low, "..", high, ", got ", *first);
  }
}

// ---- memory

// Which lists an op writes and reads, and whether two of their tensors share memory that it writes.
class Memory {
public:
  void writes(const Tensors &list, const char *name) { add(list, name, true); }
  void reads(const Tensors &list, const char *name) { add(list, name, false); }
  void reads(const Tensor &tensor, const char *name) { add(&tensor, 1, name, false); }

  // Reads a list whose tensors may be those that are written, each in its place.
  void reads_in_place(const Tensors &list, const char *name, const Tensors &written) {
    lists_.push_back({name, false});
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i].data != written[i].data || list[i].bytes() != written[i].bytes())
        add_span(list[i], i);
  }

  // In the order of their first bytes, each must begin behind what was written, and behind all if it is
  // written itself.
  void check() {
    sort();
    const Span *reach[2] = {nullptr, nullptr}; // the read and the written one that go furthest
    for (const Span &span : spans_) {
      const bool written = lists_[span.list].written;
      for (int other = written ? 0 : 1; other < 2; ++other)
        if (reach[other] && span.begin < reach[other]->end)
          refuse_pair(span, *reach[other]);
      if (!reach[written] || span.end > reach[written]->end)
        reach[written] = &span;
    }
  }

private:
  struct List {
    const char *name;
    bool written;
  };
  struct Span {
    uintptr_t begin, end;
    uint32_t list, index;
  };

  void add(const Tensors &list, const char *name, bool written) {
    add(list.data(), list.size(), name, written);
  }
  void add(const Tensor *tensors, size_t count, const char *name, bool written) {
    lists_.push_back({name, written});
    for (size_t i = 0; i < count; ++i)
      add_span(tensors[i], i);
  }
  void add_span(const Tensor &t, size_t i) {
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    if (t.numel)
      spans_.push_back({begin, begin + uintptr_t(t.bytes()), uint32_t(lists_.size() - 1), uint32_t(i)});
  }

  void sort();

  [[noreturn]] void refuse_pair(const Span &a, const Span &b) const {
    const bool first = lists_[a.list].written;
    const Span &one = first ? a : b, &two = first ? b : a;
    refuse(Name(lists_[one.list].name, one.index), " must not share memory with ",
           Name(lists_[two.list].name, two.index));
  }

  std::vector<List> lists_;
  std::vector<Span> spans_;
};

// By begin. Thousands of spans by their digits, which takes a third of what comparisons take.
inline void Memory::sort() {
  const auto before = [](const Span &a, const Span &b) { return a.begin < b.begin; };
  constexpr size_t kFew = 256;
  constexpr int kBits = 11, kDigits = 1 << kBits;
  if (spans_.size() < kFew)
    return std::sort(spans_.begin(), spans_.end(), before);
  const auto [least, most] = std::minmax_element(spans_.begin(), spans_.end(), before);
  const uintptr_t origin = least->begin, range = most->begin - origin;
  std::vector<Span> other(spans_.size());
  for (int shift = 0; range >> shift; shift += kBits) {
    size_t place[kDigits + 1] = {};
    for (const Span &span : spans_)
      ++place[((span.begin - origin) >> shift & (kDigits - 1)) + 1];
    for (int digit = 0; digit < kDigits; ++digit)
      place[digit + 1] += place[digit];
    for (const Span &span : spans_)
      other[place[(span.begin - origin) >> shift & (kDigits - 1)]++] = span;
    spans_.swap(other);
    if (shift + kBits >= 64)
      break;
  }
}

} // namespace fogzo::cpu
