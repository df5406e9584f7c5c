// From lists to blocks, which are spread over threads, and what blocks share.
#pragma once

#include "nouns.h"

#include <torch/csrc/stable/ops.h>

namespace fogzo::cpu {

constexpr int64_t kBlock = 32768; // elements per task; fixed, so that sums do not depend on threads

inline Span span_of(const Tensor &t) { return {t.data, t.dtype()}; }

inline void set_spans(std::vector<Item> &items, Span Item::*member, const Tensors &list) {
  for (size_t i = 0; i < list.size(); ++i)
    items[i].*member = span_of(list[i]);
}

// One for each of `like`; those behind the last of `alphas` have none.
inline std::vector<Item> make_items(const Tensors &like, const Tensors &alphas) {
  std::vector<Item> items(like.size());
  for (size_t i = 0; i < items.size(); ++i)
    items[i].numel = like[i].numel;
  for (size_t i = 0; i < alphas.size(); ++i) {
    items[i].scale_length = std::max<int64_t>(1, items[i].numel / std::max<int64_t>(1, alphas[i].numel));
    items[i].alpha = alphas[i].at<const float>();
  }
  return items;
}

struct Block {
  const Item *item;
  int64_t begin, end;
};

inline std::vector<Block> make_blocks(const std::vector<Item> &items) {
  std::vector<Block> blocks;
  blocks.reserve(items.size());
  for (const Item &item : items)
    for (int64_t begin = 0; begin < item.numel; begin += kBlock)
      blocks.push_back({&item, begin, std::min(item.numel, begin + kBlock)});
  return blocks;
}

// body(index, block) over all blocks, in parallel
template <class Body> void for_each_block(const std::vector<Block> &blocks, Body body) {
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i, blocks[i]);
  });
}

// The gradients of alphas that several blocks share, added in the order of the blocks.
inline void add_cuts(const std::vector<Block> &blocks, const std::vector<Cut> &cuts) {
  double sum = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto [item, begin, end] = blocks[i];
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

} // namespace fogzo::cpu
