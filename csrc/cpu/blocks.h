// From lists to blocks, which are spread over threads, and what blocks share.
#pragma once

#include "nouns.h"

#include <torch/csrc/stable/ops.h>

namespace fogzo::cpu {

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

static_assert(kBlock % kBlocks[std::size(kBlocks) - 1] == 0, "a task has whole blocks of the transform");

// Blocks of the Hadamard transform divide the last dimension of each.
inline void check_whole_blocks(const Tensors &tensors, size_t count, const char *name, int block) {
  for (size_t i = 0; i < count; ++i)
    FOGZO_CHECK(tensors[i].dim && tensors[i].sizes[tensors[i].dim - 1] % block == 0, Name(name, i),
                " must have a last dimension that block ", block, " divides, got shape ", Shape{tensors[i]});
}

// A quantizer's transform, or 0: whole blocks, each with one alpha; those of a shard are the parameter's.
inline int check_transform(int64_t given, const Tensors &tensors, const char *name, const Tensors &alphas,
                           const Ints *layouts = nullptr) {
  if (given == 0)
    return 0;
  const int block = block_of<Refusal>(given);
  check_whole_blocks(tensors, alphas.size(), name, block);
  for (size_t i = 0; i < alphas.size(); ++i) {
    const int64_t length = tensors[i].numel / std::max<int64_t>(1, alphas[i].numel);
    FOGZO_CHECK(length % block == 0, Name("alphas", i), " must be one for whole blocks of ", block,
                ", the transform's, got one for each ", length, " elements");
    for (int k = 0; layouts && tensors[i].numel && k < 3; ++k)
      FOGZO_CHECK((*layouts)[3 * i + k] % block == 0, Name("layouts", i), " must be multiples of block ", block,
                  ", the transform's, got (", (*layouts)[3 * i], ", ", (*layouts)[3 * i + 1], ", ",
                  (*layouts)[3 * i + 2], ")");
  }
  return block;
}

// That of those that have an alpha.
inline void set_block(std::vector<Item> &items, int block) {
  for (Item &item : items)
    item.block = item.alpha ? block : 0;
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
