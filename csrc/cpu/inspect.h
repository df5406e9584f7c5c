// Ops over lists that no backend has, for training loops on the CPU: what gradients hold, and numbers of steps.
#pragma once

#include "lists.h"

namespace fogzo::cpu {

// Of some elements: the sum of their bits, whether one is not 0, whether one is not finite.
struct Seen {
  uint64_t sum = 0, some = 0, lost = 0;
};

template <class Bits> Seen seen(const void *data, Bits exponent, int64_t begin, int64_t end) {
  const Bits *const bits = static_cast<const Bits *>(data), magnitude = Bits(~Bits(0)) >> 1;
  uint64_t sum = 0;
  Bits some = 0, lost = 0;
  for (int64_t i = begin; i < end; ++i) {
    sum += bits[i];
    some |= bits[i] & magnitude;
    lost |= Bits((bits[i] & exponent) == exponent);
  }
  return {sum, uint64_t(some), uint64_t(lost)};
}

inline Seen seen(const Tensor &t, int64_t begin, int64_t end) {
  switch (t.type) {
  case Type::float32:
    return seen<uint32_t>(t.data, 0x7f800000u, begin, end);
  case Type::bfloat16:
    return seen<uint16_t>(t.data, 0x7f80u, begin, end);
  case Type::float16:
    return seen<uint16_t>(t.data, 0x7c00u, begin, end);
  default:
    return seen<uint64_t>(t.data, 0x7ff0000000000000u, begin, end);
  }
}

// Writes for each tensor, int64: the sum of its bits, whether it is not all 0, whether it is finite.
inline void inspect(Arguments a) {
  const Tensor out = a.tensor();
  const Tensors &tensors = a.tensors();
  const int64_t n = int64_t(tensors.size());
  check_tensor(out, bit(Type::int64));
  require(out.dim == 2 && out.sizes[0] == 3 && out.sizes[1] == n, "shape");
  for (const Tensor &t : tensors)
    check_tensor(t, kFloats | bit(Type::float64));

  const Lists lists(tensors);
  const std::vector<Range> ranges = make_ranges(lists.items);
  std::vector<Seen> parts(ranges.size());
  for_each(ranges, [&](int64_t i, const Range &range) {
    parts[i] = seen(tensors[range.item - lists.items.data()], range.begin, range.end);
  });
  int64_t *const sums = out.at<int64_t>(), *const some = sums + n, *const finite = some + n;
  std::fill_n(sums, 2 * n, 0);
  std::fill_n(finite, n, 1);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const int64_t k = ranges[i].item - lists.items.data();
    sums[k] = int64_t(uint64_t(sums[k]) + parts[i].sum);
    some[k] |= parts[i].some != 0;
    finite[k] &= parts[i].lost == 0;
  }
}

// Counts elements that are not in least..most, NaN among them.
inline int64_t outside(Arguments a) {
  const Tensors &tensors = a.tensors(), &least = a.tensors();
  const double most = a.number();
  check_list(tensors, kFloat32, tensors, tensors.size());
  check_list(least, kFloat32, tensors, tensors.size());
  int64_t count = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const float *const values = tensors[i].at<const float>(), *const low = least[i].at<const float>();
    for (int64_t j = 0; j < tensors[i].numel; ++j)
      count += !(values[j] >= low[j] && double(values[j]) <= most);
  }
  return count;
}

// Adds 1 to each count, int64 and 0-dim.
inline void add_one(Arguments a) {
  const Tensors &counts = a.tensors();
  for (const Tensor &t : counts)
    scalar<int64_t>(t, Type::int64);
  for (const Tensor &t : counts)
    ++*t.at<int64_t>();
}

} // namespace fogzo::cpu
