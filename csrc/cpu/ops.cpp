// CPU ops over lists of tensors: read the arguments, check them all, cut into blocks, spread over threads, call
// the kernels. Registered through the LibTorch stable ABI, so that one build serves several torch releases.
#include "blocks.h"

namespace fogzo::cpu {
namespace {

// ---- noise and guide norm

// An argument that is one tensor, as a list.
Tensors alone(Arguments &a) {
  Tensors list;
  list.push_back(a.tensor());
  return list;
}

void noise(Arguments a) {
  const Tensors out = alone(a);
  Draw draw(a);
  const int64_t direction = a.integer();
  check_tensor(out[0], "out", bit(Type::float32));
  draw.check(out, 1);
  check_range(direction, 0, kMaxDirection - 1, "direction");
  const Kernels &run = kernels();
  std::vector<Item> items = make_items(out, {});
  draw.name_items(items);
  Noise what = draw.noise(direction);
  what.names.tensor_id = items[0].tensor_id;
  float *const data = out[0].at<float>();
  for_each_block(make_blocks(items), [&](int64_t, const Block &block) {
    run.noise(what, items[0].layout, float(draw.C), data, block.begin, block.end);
  });
}

void guide_sumsq(Arguments a) {
  const Tensors out = alone(a), grads = a.tensors(), alphas = a.tensors();
  const int64_t r = a.integer();
  check_scalar(out[0], "out", Type::float64);
  check_list(grads, "grads", kFloats);
  check_range(r, 1, 2, "r");
  check_length(alphas, grads.size(), "alphas");
  check_alphas(alphas, grads, r);
  const Kernels &run = kernels();
  std::vector<Item> items = make_items(grads, alphas);
  set_spans(items, &Item::grad, grads);
  const std::vector<Block> blocks = make_blocks(items);
  std::vector<double> partial(blocks.size());
  for_each_block(blocks, [&](int64_t i, const Block &block) {
    partial[i] = run.sumsq(*block.item, float(r), block.begin, block.end);
  });
  double sum = 0;
  for (double x : partial)
    sum += x;
  *out[0].at<double>() = sum;
}

// ---- perturb and quantize

void perturb_quantize(Arguments a) {
  const Tensors plus = a.tensors(), minus = a.tensors(), latents = a.tensors(), grads = a.tensors(),
                alphas = a.tensors();
  Draw draw(a);
  Mix mix(a);
  const int64_t direction = a.integer();
  const Grid grid(a);
  const size_t count = latents.size();
  check_list(latents, "latents", kFloats);
  check_list_like(grads, "grads", kFloats, latents, count);
  FOGZO_CHECK(!count || !plus.empty() || !minus.empty(), "plus and minus must not both be empty");
  if (!plus.empty())
    check_list_like(plus, "plus", kOutputs, latents, count);
  if (!minus.empty())
    check_list_like(minus, "minus", plus.empty() ? kOutputs : bit(plus[0].type), latents, count);
  grid.check();
  check_length(alphas, count, "alphas");
  check_alphas(alphas, latents, grid.r);
  mix.check();
  draw.check(latents, count);
  const int block = check_transform(grid.block, latents, "latents", alphas, &draw.layouts);
  check_range(direction, 0, kMaxDirection - 1, "direction");
  Memory memory;
  memory.writes(plus, "plus");
  memory.writes(minus, "minus");
  memory.reads(latents, "latents");
  memory.reads(grads, "grads");
  memory.reads(alphas, "alphas");
  memory.reads(mix.norm_tensor, "norm");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(latents, alphas);
  set_block(items, block);
  draw.name_items(items);
  set_spans(items, &Item::latent, latents);
  set_spans(items, &Item::grad, grads);
  set_spans(items, &Item::plus, plus);
  set_spans(items, &Item::minus, minus);
  const Noise what = draw.noise(direction);
  const float sign = direction_sign(what.names.seed, what.names.step, what.names.direction);
  const Perturbation p{what,
                       grid.range(),
                       float(grid.r),
                       float(mix.over_norm(float(std::sqrt(1.0 - mix.one_minus_beta)) * sign)),
                       float(std::sqrt(mix.one_minus_beta) * draw.C),
                       float(mix.epsilon)};
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) { run.perturb(*b.item, p, b.begin, b.end); });
}

// ---- estimate

// A and B of the contract, from the losses. Not usable: the step is lost and g keeps the STE gradient.
struct Coefficients {
  float A = 0.0f;
  std::vector<float> B;
  bool usable = false;
};

// Counts what is lost.
Coefficients coefficients_of(const Draw &draw, const Mix &mix, const Losses &losses) {
  Coefficients found;
  const int64_t n = losses.n();
  const float *plus = losses.plus.at<const float>(), *minus = losses.minus.at<const float>();
  double sum = 0;
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    double c = (double(plus[i]) - double(minus[i])) / (2.0 * double(float(mix.epsilon)));
    if (!std::isfinite(float(c))) {
      c = 0;
      ++lost;
    }
    sum += c * direction_sign(uint64_t(draw.seed), uint32_t(draw.step), uint32_t(i));
    found.B.push_back(float(c * std::sqrt(mix.one_minus_beta) * draw.C / double(n)));
  }
  found.A = float(mix.over_norm(sum * std::sqrt(1.0 - mix.one_minus_beta) / double(n)));
  const bool norm_lost = !std::isfinite(mix.norm);
  losses.count(lost, norm_lost); // the third counter, of bad alphas, stays: they are refused
  found.usable = lost < n && !norm_lost;
  return found;
}

void estimate_gradient(Arguments a) {
  const Tensors grads = a.tensors(), counters = a.tensors(), alphas = a.tensors();
  Draw draw(a);
  Mix mix(a);
  const Losses losses(a, counters);
  const int64_t r = a.integer(), given = a.integer();
  check_list(grads, "grads", kFloats);
  check_range(r, 1, 2, "r");
  check_length(alphas, grads.size(), "alphas");
  check_alphas(alphas, grads, r);
  mix.check();
  draw.check(grads, grads.size());
  const int block = check_transform(given, grads, "grads", alphas, &draw.layouts);
  losses.check(1);
  Memory memory;
  memory.writes(grads, "grads");
  losses.touch(memory);
  memory.reads(alphas, "alphas");
  memory.reads(mix.norm_tensor, "norm");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(grads, alphas);
  set_block(items, block);
  draw.name_items(items);
  set_spans(items, &Item::grad, grads);
  const Coefficients c = coefficients_of(draw, mix, losses);
  if (!c.usable)
    return;
  const Estimate e{draw.noise(0), float(r), c.A, c.B.data(), int64_t(c.B.size())};
  for_each_block(make_blocks(items),
                 [&](int64_t, const Block &b) { run.estimate(*b.item, e, b.begin, b.end); });
}

// ---- the fused tail

// Its lists. The first alphas.size() of the latents are quantized, the others have no alpha.
struct TailLists {
  Tensors latents, masters, first, second, quantized, counters, grads, alphas;

  explicit TailLists(Arguments &a)
      : latents(a.tensors()), masters(a.tensors()), first(a.tensors()), second(a.tensors()),
        quantized(a.tensors()), counters(a.tensors()), grads(a.tensors()), alphas(a.tensors()) {}

  void check(Rule rule, int64_t r) const {
    const size_t count = latents.size();
    check_list(latents, "latents", kFloats);
    check_list_like(grads, "grads", kFloats, latents, count);
    if (!masters.empty()) {
      check_list_like(masters, "masters", bit(Type::float32), latents, count);
      FOGZO_CHECK(latents[0].type != Type::float32,
                  "latents must be bfloat16 or float16 where masters are given, got float32");
    }
    check_state(first, "first", rule, 0);
    check_state(second, "second", rule, 1);
    FOGZO_CHECK(alphas.size() <= count, "alphas must have at most ", count, " tensors, got ", alphas.size());
    if (!quantized.empty())
      check_list_like(quantized, "quantized", kOutputs, latents, alphas.size());
    check_alphas(alphas, latents, r);
  }

  void touch(Memory &memory) const {
    memory.writes(latents, "latents");
    memory.writes(masters, "masters");
    memory.writes(first, "first");
    memory.writes(second, "second");
    memory.writes(quantized, "quantized");
    memory.reads(grads, "grads");
    memory.reads(alphas, "alphas");
  }

  std::vector<Item> items() const {
    std::vector<Item> found = make_items(latents, alphas);
    set_spans(found, &Item::latent, latents);
    set_spans(found, &Item::grad, grads);
    set_spans(found, &Item::plus, quantized);
    set_spans(found, &Item::master, masters);
    set_spans(found, &Item::first, first);
    set_spans(found, &Item::second, second);
    return found;
  }

private:
  void check_state(const Tensors &list, const char *name, Rule rule, int place) const {
    const size_t count = place < states_of(rule) ? latents.size() : 0;
    FOGZO_CHECK(list.size() == count, name, " must have ", count, " tensors for ", name_of(rule), ", got ",
                list.size());
    check_list_like(list, name, bit(Type::float32), latents, count);
  }
};

void estimate_update(Arguments a) {
  const TailLists lists(a);
  Draw draw(a);
  Mix mix(a);
  const Losses losses(a, lists.counters);
  const Grid grid(a);
  Optimizer optimizer(a);
  optimizer.check();
  grid.check();
  lists.check(optimizer.update.rule, grid.r);
  mix.check();
  draw.check(lists.latents, lists.alphas.size());
  const int block = check_transform(grid.block, lists.latents, "latents", lists.alphas, &draw.layouts);
  losses.check(0);
  Memory memory;
  lists.touch(memory);
  losses.touch(memory);
  memory.reads(mix.norm_tensor, "norm");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = lists.items();
  set_block(items, block);
  draw.name_items(items);
  Tail tail{{draw.noise(0), float(grid.r), 1.0f, nullptr, 0}, optimizer.update, grid.range(), false};
  Coefficients c;
  if (losses.n()) {
    tail.skip = !std::isfinite(mix.norm);
    c = coefficients_of(draw, mix, losses);
  }
  if (c.usable) {
    tail.estimate.A = c.A;
    tail.estimate.B = c.B.data();
    tail.estimate.directions = int64_t(c.B.size());
  }
  for_each_block(make_blocks(items),
                 [&](int64_t, const Block &b) { run.update(*b.item, tail, b.begin, b.end); });
}

// ---- quantize and its straight-through derivative

void quantize(Arguments a) {
  const Tensors out = a.tensors(), latents = a.tensors(), alphas = a.tensors();
  const Grid grid(a);
  check_list(latents, "latents", kFloats);
  check_list_like(out, "out", kOutputs, latents, latents.size());
  grid.check();
  check_length(alphas, latents.size(), "alphas");
  check_alphas(alphas, latents, grid.r);
  const int block = check_transform(grid.block, latents, "latents", alphas);
  Memory memory;
  memory.writes(out, "out");
  memory.reads(latents, "latents");
  memory.reads(alphas, "alphas");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(latents, alphas);
  set_block(items, block);
  set_spans(items, &Item::latent, latents);
  set_spans(items, &Item::plus, out);
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) {
    run.quantize(*b.item, grid.range(), float(grid.r), b.begin, b.end);
  });
}

void straight_through_backward(Arguments a) {
  const Tensors out = a.tensors(), grads = a.tensors(), latents = a.tensors(), alphas = a.tensors();
  const Grid grid(a);
  const std::string name = a.text();
  check_list(latents, "latents", kFloats);
  check_list_like(grads, "grads", kFloats, latents, latents.size());
  check_list_like(out, "out", kFloats, latents, latents.size());
  grid.check();
  check_length(alphas, latents.size(), "alphas");
  check_alphas(alphas, latents, grid.r);
  const int block = check_transform(grid.block, latents, "latents", alphas);
  const auto what = value_of<StraightThrough, Refusal>(name, "straight_through");
  Memory memory;
  memory.writes(out, "out");
  memory.reads_in_place(grads, "grads", out);
  memory.reads(latents, "latents");
  memory.reads(alphas, "alphas");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(latents, alphas);
  set_block(items, block);
  set_spans(items, &Item::latent, latents);
  set_spans(items, &Item::grad, grads);
  set_spans(items, &Item::plus, out);
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) {
    run.straight_through(*b.item, what, grid.range(), float(grid.r), b.begin, b.end);
  });
}

void learned_backward(Arguments a) {
  const Tensors out = a.tensors(), alpha_grads = a.tensors(), grads = a.tensors(), latents = a.tensors(),
                alphas = a.tensors();
  const Grid grid(a);
  const std::string name = a.text();
  const std::vector<double> factors = a.numbers();
  check_list(latents, "latents", kFloats);
  check_list_like(grads, "grads", kFloats, latents, latents.size());
  check_list_like(out, "out", kFloats, latents, latents.size());
  grid.check();
  check_length(alphas, latents.size(), "alphas");
  check_alphas(alphas, latents, grid.r);
  const int block = check_transform(grid.block, latents, "latents", alphas);
  check_list_like(alpha_grads, "alpha_grads", bit(Type::float32), alphas, alphas.size());
  const auto what = value_of<StraightThrough, Refusal>(name, "straight_through");
  FOGZO_CHECK(factors.size() == latents.size(), "factors must have ", latents.size(), " entries, got ",
              factors.size());
  for (size_t i = 0; i < factors.size(); ++i)
    FOGZO_CHECK(std::isfinite(factors[i]), Name("factors", i), " must be finite, got ", factors[i]);
  Memory memory;
  memory.writes(out, "out");
  memory.writes(alpha_grads, "alpha_grads");
  memory.reads_in_place(grads, "grads", out);
  memory.reads(latents, "latents");
  memory.reads(alphas, "alphas");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(latents, alphas);
  set_block(items, block);
  set_spans(items, &Item::latent, latents);
  set_spans(items, &Item::grad, grads);
  set_spans(items, &Item::plus, out);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].alpha_grad = alpha_grads[i].at<float>();
    items[i].factor = factors[i];
    if (!items[i].numel)
      std::fill_n(items[i].alpha_grad, alpha_grads[i].numel, 0.0f);
  }
  const std::vector<Block> blocks = make_blocks(items);
  std::vector<Cut> cuts(blocks.size());
  for_each_block(blocks, [&](int64_t i, const Block &b) {
    cuts[i] = run.learned(*b.item, what, grid.range(), float(grid.r), b.begin, b.end);
  });
  add_cuts(blocks, cuts);
}

} // namespace

// ---- schemas

STABLE_TORCH_LIBRARY(fogzo_cpu, m) {
  m.def("noise(Tensor(a!) out, " FOGZO_DRAW ", int direction) -> ()");
  m.def("guide_sumsq(Tensor(a!) out, Tensor[] grads, Tensor[] alphas, int r) -> ()");
  m.def("perturb_quantize(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads, "
        "Tensor[] alphas, " FOGZO_DRAW ", " FOGZO_MIX ", int direction, " FOGZO_GRID ") -> ()");
  m.def("estimate_gradient(Tensor(a!)[] grads, Tensor(b!)[] counters, Tensor[] alphas, " FOGZO_DRAW
        ", " FOGZO_MIX ", " FOGZO_LOSSES ", int r, int block) -> ()");
  m.def("estimate_update(Tensor(a!)[] latents, Tensor(b!)[] masters, Tensor(c!)[] first, Tensor(d!)[] second, "
        "Tensor(e!)[] quantized, Tensor(f!)[] counters, Tensor[] grads, Tensor[] alphas, " FOGZO_DRAW
        ", " FOGZO_MIX ", " FOGZO_LOSSES ", " FOGZO_GRID ", " FOGZO_UPDATE ") -> ()");
  m.def("quantize(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, " FOGZO_GRID ") -> ()");
  m.def("straight_through_backward(Tensor(a!)[] out, Tensor[] grads, Tensor[] latents, Tensor[] "
        "alphas, " FOGZO_GRID ", str straight_through) -> ()");
  m.def("learned_backward(Tensor(a!)[] out, Tensor(b!)[] alpha_grads, Tensor[] grads, Tensor[] latents, "
        "Tensor[] alphas, " FOGZO_GRID ", str straight_through, float[] factors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fogzo_cpu, CompositeExplicitAutograd, m) {
  m.impl("noise", boxed<noise>);
  m.impl("guide_sumsq", boxed<guide_sumsq>);
  m.impl("perturb_quantize", boxed<perturb_quantize>);
  m.impl("estimate_gradient", boxed<estimate_gradient>);
  m.impl("estimate_update", boxed<estimate_update>);
  m.impl("quantize", boxed<quantize>);
  m.impl("straight_through_backward", boxed<straight_through_backward>);
  m.impl("learned_backward", boxed<learned_backward>);
}

} // namespace fogzo::cpu
