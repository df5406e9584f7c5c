// The Hadamard transform over lists of tensors: as the ops of ops.cpp.
#include "blocks.h"

namespace fogzo::cpu {
namespace {

void hadamard(Arguments a) {
  const Tensors out = a.tensors(), tensors = a.tensors();
  const int64_t given = a.integer();
  check_list(tensors, "tensors", kFloats);
  check_list_like(out, "out", kFloats, tensors, tensors.size());
  const int block = block_of<Refusal>(given);
  check_whole_blocks(tensors, tensors.size(), "tensors", block);
  Memory memory;
  memory.writes(out, "out");
  memory.reads_in_place(tensors, "tensors", out);
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(tensors, {});
  set_spans(items, &Item::latent, tensors);
  set_spans(items, &Item::plus, out);
  for (Item &item : items)
    item.block = block;
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) { run.hadamard(*b.item, b.begin, b.end); });
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fogzo_cpu, m) {
  m.def("hadamard(Tensor(a!)[] out, Tensor[] tensors, int block) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fogzo_cpu, CompositeExplicitAutograd, m) { m.impl("hadamard", boxed<hadamard>); }

} // namespace fogzo::cpu
