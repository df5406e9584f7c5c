// CPU ops over lists of tensors: check, cut into blocks, spread over threads, call the kernels.
// Registered through the LibTorch stable ABI, so that one build serves several torch releases.
#include "../checks.h"
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fogzo::cpu {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kBlock = 32768; // elements per task; fixed, so that sums do not depend on threads

Dtype dtype_of(const Tensor &t, const Name &name) {
  switch (t.scalar_type()) {
  case ScalarType::Float:
    return Dtype::float32;
  case ScalarType::BFloat16:
    return Dtype::bfloat16;
  case ScalarType::Half:
    return Dtype::float16;
  case ScalarType::Char:
    return Dtype::int8;
  default:
    STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16, or int8 for codes, got ",
                    torch::headeronly::toString(t.scalar_type()));
  }
}

Span span_of(const Tensor &t, const Name &name, bool codes = false) {
  const Dtype dtype = dtype_of(t, name);
  STD_TORCH_CHECK(codes || dtype != Dtype::int8, name, " must be float32, bfloat16 or float16, got int8");
  return {t.data_ptr(), dtype};
}

Distribution distribution_of(const std::string &name) {
  if (name == "uniform")
    return Distribution::uniform;
  if (name == "rademacher")
    return Distribution::rademacher;
  if (name == "triangular")
    return Distribution::triangular;
  if (name == "logistic")
    return Distribution::logistic;
  STD_TORCH_CHECK(name == "gaussian", "distribution must be a known one, got ", name);
  return Distribution::gaussian;
}

StraightThrough straight_through_of(const std::string &kind, bool clip) {
  if (kind == "identity")
    return clip ? StraightThrough::identity_clipped : StraightThrough::identity;
  if (kind == "hardtanh")
    return StraightThrough::hardtanh;
  if (kind == "tanh")
    return StraightThrough::tanh;
  STD_TORCH_CHECK(kind == "approxsign", "straight_through must be a known one, got ", kind);
  return StraightThrough::approxsign;
}

// Codes fit in int8, so that their conversion from float32 is defined.
GridRange grid_of(int64_t qmin, int64_t qmax, double offset) {
  check_range(qmin, -128, 127, "qmin");
  check_range(qmax, qmin, 127, "qmax");
  STD_TORCH_CHECK(offset == 0.0 || offset == 0.5, "offset must be 0 or 0.5, got ", offset);
  return {float(qmin), float(qmax), float(offset)};
}

float ratio_of(int64_t r) {
  check_range(r, 1, 2, "r");
  return float(r);
}

// In the ranges of the contract: a number cut to its lower bits would name other noise.
Names names_of(int64_t seed, int64_t step, int64_t direction, int64_t tensor_id) {
  check_range(step, 0, (int64_t(1) << 32) - 1, "step");
  check_range(direction, 0, (int64_t(1) << 16) - 1, "direction");
  return {uint64_t(seed), uint32_t(step), uint32_t(direction), uint32_t(tensor_id)};
}

std::vector<Item> make_items(const TensorList &like, const TensorList &alphas) {
  check_alphas(alphas, like);
  std::vector<Item> items(like.size());
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].numel = like[i].numel();
    items[i].scale_length = std::max<int64_t>(1, items[i].numel / std::max<int64_t>(1, alphas[i].numel()));
    items[i].alpha = static_cast<const float *>(alphas[i].data_ptr());
  }
  return items;
}

void set_spans(std::vector<Item> &items, Span Item::*member, const TensorList &list, const char *name,
               bool codes = false) {
  for (size_t i = 0; i < list.size(); ++i)
    items[i].*member = span_of(list[i], {name, i}, codes);
}

void set_names(std::vector<Item> &items, const Ints &tensor_ids, const Ints &layouts, const TensorList &like) {
  check_names(tensor_ids, layouts, like);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].layout = {layouts[3 * i], layouts[3 * i + 1], layouts[3 * i + 2]};
    items[i].tensor_id = uint32_t(tensor_ids[i]);
  }
}

struct Block {
  const Item *item;
  int64_t begin, end;
};

std::vector<Block> make_blocks(const std::vector<Item> &items) {
  std::vector<Block> blocks;
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

// a / N of the contract: 0 unless N is finite and > 0
double over_norm(double numerator, double norm) {
  return std::isfinite(norm) && norm > 0 ? numerator / norm : 0.0;
}

float norm_of(const Tensor &norm) {
  check_scalar(norm, ScalarType::Float, "norm");
  return *static_cast<const float *>(norm.data_ptr());
}

void noise(const Tensor &out, const std::string &distribution, double scale, int64_t seed, int64_t step,
           int64_t direction, int64_t tensor_id, const Ints &layout) {
  const Kernels &run = kernels();
  check_cpu_contiguous(out, "out");
  check_dtype(out, ScalarType::Float, "out");
  std::vector<Item> items(1);
  items[0].numel = out.numel();
  set_names(items, {tensor_id}, layout, {out});
  const Noise what{distribution_of(distribution), names_of(seed, step, direction, tensor_id)};
  float *data = static_cast<float *>(out.data_ptr());
  for_each_block(make_blocks(items), [&](int64_t, const Block &block) {
    run.noise(what, items[0].layout, float(scale), data, block.begin, block.end);
  });
}

void guide_sumsq(const Tensor &out, const TensorList &grads, const TensorList &alphas, int64_t r) {
  const Kernels &run = kernels();
  check_scalar(out, ScalarType::Double, "out");
  check_list(grads, grads, "grads", false);
  std::vector<Item> items = make_items(grads, alphas);
  set_spans(items, &Item::grad, grads, "grads");
  const std::vector<Block> blocks = make_blocks(items);
  std::vector<double> partial(blocks.size());
  const float ratio = ratio_of(r);
  for_each_block(blocks, [&](int64_t i, const Block &block) {
    partial[i] = run.sumsq(*block.item, ratio, block.begin, block.end);
  });
  double sum = 0;
  for (double x : partial)
    sum += x;
  *static_cast<double *>(out.data_ptr()) = sum;
}

void perturb_quantize(const TensorList &plus, const TensorList &minus, const TensorList &latents,
                      const TensorList &grads, const TensorList &alphas, const Tensor &norm, int64_t seed,
                      int64_t step, double one_minus_beta, int64_t direction, const Ints &tensor_ids,
                      const Ints &layouts, int64_t qmin, int64_t qmax, double offset, int64_t r,
                      const std::string &distribution, double noise_scale, double epsilon) {
  const Kernels &run = kernels();
  check_list(latents, latents, "latents", false);
  check_list(grads, latents, "grads", false);
  check_list(plus, latents, "plus", true);
  check_list(minus, latents, "minus", true);
  std::vector<Item> items = make_items(latents, alphas);
  set_names(items, tensor_ids, layouts, latents);
  set_spans(items, &Item::latent, latents, "latents");
  set_spans(items, &Item::grad, grads, "grads");
  set_spans(items, &Item::plus, plus, "plus", true);
  set_spans(items, &Item::minus, minus, "minus", true);
  for (size_t i = 0; i < std::min(plus.size(), minus.size()); ++i) // the kernels store both alike
    check_dtype(minus[i], plus[i].scalar_type(), {"minus", i});
  const Names names = names_of(seed, step, direction, 0);
  const float sign = direction_sign(names.seed, names.step, names.direction);
  const Perturbation p{{distribution_of(distribution), names},
                       grid_of(qmin, qmax, offset),
                       ratio_of(r),
                       float(over_norm(float(std::sqrt(1.0 - one_minus_beta)) * sign, norm_of(norm))),
                       float(std::sqrt(one_minus_beta) * noise_scale),
                       float(epsilon)};
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) { run.perturb(*b.item, p, b.begin, b.end); });
}

// A and B of the contract, from the losses; false if the step is lost and g keeps the STE gradient.
// counters: lost directions, lost norms.
bool estimate_coefficients(const Tensor &losses_plus, const Tensor &losses_minus, float norm,
                           double one_minus_beta, double epsilon, double noise_scale, const Names &names,
                           int64_t *counters, float &A, std::vector<float> &B) {
  const int64_t n = losses_plus.numel();
  const float *plus = static_cast<const float *>(losses_plus.data_ptr());
  const float *minus = static_cast<const float *>(losses_minus.data_ptr());
  double sum = 0;
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    double c = (double(plus[i]) - double(minus[i])) / (2.0 * double(float(epsilon)));
    if (!std::isfinite(float(c))) {
      c = 0;
      ++lost;
    }
    sum += c * direction_sign(names.seed, names.step, uint32_t(i));
    B.push_back(float(c * std::sqrt(one_minus_beta) * noise_scale / double(n)));
  }
  A = float(over_norm(sum * std::sqrt(1.0 - one_minus_beta) / double(n), norm));
  const bool norm_lost = !std::isfinite(norm);
  if (counters) {
    counters[0] += lost;
    counters[1] += norm_lost;
  }
  return lost < n && !norm_lost;
}

int64_t count_bad_alphas(const TensorList &alphas) {
  int64_t bad = 0;
  for (const Tensor &alpha : alphas) {
    const float *data = static_cast<const float *>(alpha.data_ptr());
    for (int64_t i = 0; i < alpha.numel(); ++i)
      bad += !(data[i] > 0 && std::isfinite(data[i]));
  }
  return bad;
}

void check_losses(const Tensor &plus, const Tensor &minus, int64_t least) {
  check_cpu_contiguous(plus, "losses_plus");
  check_cpu_contiguous(minus, "losses_minus");
  check_dtype(plus, ScalarType::Float, "losses_plus");
  check_dtype(minus, ScalarType::Float, "losses_minus");
  check_range(plus.numel(), least, int64_t(1) << 16, "the number of losses_plus");
  STD_TORCH_CHECK(minus.numel() == plus.numel(), "losses_minus must have ", plus.numel(), " elements, got ",
                  minus.numel());
}

int64_t *counters_of(const TensorList &counters) {
  if (counters.empty())
    return nullptr;
  STD_TORCH_CHECK(counters.size() == 1, "counters must have at most 1 tensor, got ", counters.size());
  check_cpu_contiguous(counters[0], "counters");
  check_dtype(counters[0], ScalarType::Long, "counters");
  STD_TORCH_CHECK(counters[0].numel() == 3, "counters must have 3 elements, got ", counters[0].numel());
  return static_cast<int64_t *>(counters[0].data_ptr());
}

void estimate_gradient(const TensorList &grads, const TensorList &counters, const Tensor &losses_plus,
                       const Tensor &losses_minus, const TensorList &alphas, const Tensor &norm, int64_t seed,
                       int64_t step, double one_minus_beta, const Ints &tensor_ids, const Ints &layouts,
                       int64_t r, const std::string &distribution, double noise_scale, double epsilon) {
  const Kernels &run = kernels();
  check_list(grads, grads, "grads", false);
  check_losses(losses_plus, losses_minus, 1);
  std::vector<Item> items = make_items(grads, alphas);
  set_names(items, tensor_ids, layouts, grads);
  set_spans(items, &Item::grad, grads, "grads");
  int64_t *counts = counters_of(counters);
  Estimate e{{distribution_of(distribution), names_of(seed, step, 0, 0)}, ratio_of(r), 0.0f, nullptr, 0};
  const float N = norm_of(norm); // the last check: what follows writes
  if (counts)
    counts[2] += count_bad_alphas(alphas);
  std::vector<float> B;
  if (!estimate_coefficients(losses_plus, losses_minus, N, one_minus_beta, epsilon, noise_scale, e.noise.names,
                             counts, e.A, B))
    return;
  e.B = B.data();
  e.directions = int64_t(B.size());
  for_each_block(make_blocks(items),
                 [&](int64_t, const Block &b) { run.estimate(*b.item, e, b.begin, b.end); });
}

Update update_of(const std::string &rule, const std::vector<double> &h, double lr, int64_t count) {
  // h: weight decay, beta1, beta2, eps, momentum, dampening
  STD_TORCH_CHECK(h.size() == 6, "hyperparameters must be 6 numbers, got ", h.size());
  STD_TORCH_CHECK(count >= 1, "count must be >= 1, got ", count);
  if (rule == "adamw")
    return {Rule::adamw,
            float(lr / (1.0 - std::pow(h[1], double(count)))),
            float(1.0 - lr * h[0]),
            float(1.0 / std::sqrt(1.0 - std::pow(h[2], double(count)))),
            float(1.0 - h[1]),
            float(1.0 - h[2]),
            float(h[2]),
            float(h[3]),
            0.0f,
            0.0f};
  Update u{Rule::sgd, float(lr), float(count == 1 ? 1.0 : 1.0 - h[5]), 0, 0, 0, 0, 0, float(h[0]), float(h[4])};
  if (rule == "momentum")
    u.rule = Rule::momentum;
  else if (rule == "nesterov")
    u.rule = Rule::nesterov;
  else
    STD_TORCH_CHECK(rule == "sgd", "rule must be a known one, got ", rule);
  return u;
}

// Items of the fused tail: the first alphas.size() are quantized, the others have no alpha.
std::vector<Item> update_items(const TensorList &latents, const TensorList &masters, const TensorList &first,
                               const TensorList &second, const TensorList &quantized, const TensorList &grads,
                               const TensorList &alphas, const Ints &tensor_ids, const Ints &layouts) {
  check_list(latents, latents, "latents", false);
  check_list(grads, latents, "grads", false);
  STD_TORCH_CHECK(alphas.size() <= latents.size(), "alphas must have at most ", latents.size(),
                  " tensors, got ", alphas.size());
  const TensorList quantizing(latents.begin(), latents.begin() + alphas.size());
  check_list(quantized, quantizing, "quantized", true);
  std::vector<Item> items = make_items(quantizing, alphas);
  set_names(items, tensor_ids, layouts, quantizing);
  for (size_t i = items.size(); i < latents.size(); ++i) {
    items.emplace_back();
    items.back().numel = latents[i].numel();
  }
  set_spans(items, &Item::latent, latents, "latents");
  set_spans(items, &Item::grad, grads, "grads");
  set_spans(items, &Item::plus, quantized, "quantized", true);
  const struct {
    const char *name;
    const TensorList &list;
    Span Item::*member;
  } states[] = {
      {"masters", masters, &Item::master}, {"first", first, &Item::first}, {"second", second, &Item::second}};
  for (const auto &[name, list, member] : states) {
    check_list(list, latents, name, true);
    for (size_t i = 0; i < list.size(); ++i)
      check_dtype(list[i], ScalarType::Float, {name, i});
    set_spans(items, member, list, name);
  }
  return items;
}

void estimate_update(const TensorList &latents, const TensorList &masters, const TensorList &first,
                     const TensorList &second, const TensorList &quantized, const TensorList &counters,
                     const TensorList &grads, const Tensor &losses_plus, const Tensor &losses_minus,
                     const TensorList &alphas, const Tensor &norm, int64_t seed, int64_t step,
                     double one_minus_beta, const Ints &tensor_ids, const Ints &layouts, int64_t qmin,
                     int64_t qmax, double offset, int64_t r, const std::string &distribution,
                     double noise_scale, double epsilon, const std::string &rule,
                     const std::vector<double> &hyperparameters, double lr, int64_t count) {
  const Kernels &run = kernels();
  check_losses(losses_plus, losses_minus, 0);
  const std::vector<Item> items =
      update_items(latents, masters, first, second, quantized, grads, alphas, tensor_ids, layouts);
  int64_t *counts = counters_of(counters);
  Tail tail{{{distribution_of(distribution), names_of(seed, step, 0, 0)}, ratio_of(r), 1.0f, nullptr, 0},
            update_of(rule, hyperparameters, lr, count),
            grid_of(qmin, qmax, offset),
            false};
  STD_TORCH_CHECK(tail.update.rule == Rule::sgd || first.size() == latents.size(), "first must have ",
                  latents.size(), " tensors for ", rule, ", got ", first.size());
  STD_TORCH_CHECK(tail.update.rule != Rule::adamw || second.size() == latents.size(), "second must have ",
                  latents.size(), " tensors for ", rule, ", got ", second.size());
  const float N = norm_of(norm); // the last check: what follows writes
  std::vector<float> B;
  if (losses_plus.numel()) {
    if (counts)
      counts[2] += count_bad_alphas(alphas);
    tail.skip = !std::isfinite(N);
    if (estimate_coefficients(losses_plus, losses_minus, N, one_minus_beta, epsilon, noise_scale,
                              tail.estimate.noise.names, counts, tail.estimate.A, B)) {
      tail.estimate.B = B.data();
      tail.estimate.directions = int64_t(B.size());
    }
  }
  for_each_block(make_blocks(items),
                 [&](int64_t, const Block &b) { run.update(*b.item, tail, b.begin, b.end); });
}

void quantize(const TensorList &out, const TensorList &latents, const TensorList &alphas, int64_t qmin,
              int64_t qmax, double offset, int64_t r) {
  const Kernels &run = kernels();
  check_list(latents, latents, "latents", false);
  check_list(out, latents, "out", false);
  std::vector<Item> items = make_items(latents, alphas);
  set_spans(items, &Item::latent, latents, "latents");
  set_spans(items, &Item::plus, out, "out", true);
  const GridRange grid = grid_of(qmin, qmax, offset);
  const float ratio = ratio_of(r);
  for_each_block(make_blocks(items),
                 [&](int64_t, const Block &b) { run.quantize(*b.item, grid, ratio, b.begin, b.end); });
}

void straight_through_backward(const TensorList &out, const TensorList &grads, const TensorList &latents,
                               const TensorList &alphas, int64_t qmin, int64_t qmax, double offset, int64_t r,
                               const std::string &kind, bool clip) {
  const Kernels &run = kernels();
  check_list(latents, latents, "latents", false);
  check_list(grads, latents, "grads", false);
  check_list(out, latents, "out", false);
  std::vector<Item> items = make_items(latents, alphas);
  set_spans(items, &Item::latent, latents, "latents");
  set_spans(items, &Item::grad, grads, "grads");
  set_spans(items, &Item::plus, out, "out");
  const GridRange grid = grid_of(qmin, qmax, offset);
  const float ratio = ratio_of(r);
  const StraightThrough what = straight_through_of(kind, clip);
  for_each_block(make_blocks(items), [&](int64_t, const Block &b) {
    run.straight_through(*b.item, what, grid, ratio, b.begin, b.end);
  });
}

} // namespace

STABLE_TORCH_LIBRARY(fogzo_cpu, m) {
  m.def(
      "noise(Tensor(a!) out, str distribution, float scale, int seed, int step, int direction, int tensor_id, "
      "int[] layout) -> ()");
  m.def("guide_sumsq(Tensor(a!) out, Tensor[] grads, Tensor[] alphas, int r) -> ()");
  m.def("perturb_quantize(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads, "
        "Tensor[] alphas, Tensor norm, int seed, int step, float one_minus_beta, int direction, "
        "int[] tensor_ids, int[] layouts, int qmin, int qmax, float offset, int r, str distribution, "
        "float noise_scale, float epsilon) -> ()");
  m.def("estimate_gradient(Tensor(a!)[] grads, Tensor(b!)[] counters, Tensor losses_plus, Tensor losses_minus, "
        "Tensor[] alphas, Tensor norm, int seed, int step, float one_minus_beta, int[] tensor_ids, "
        "int[] layouts, int r, str distribution, float noise_scale, float epsilon) -> ()");
  m.def("estimate_update(Tensor(a!)[] latents, Tensor(b!)[] masters, Tensor(c!)[] first, Tensor(d!)[] second, "
        "Tensor(e!)[] quantized, Tensor(f!)[] counters, Tensor[] grads, Tensor losses_plus, "
        "Tensor losses_minus, Tensor[] alphas, Tensor norm, int seed, int step, float one_minus_beta, "
        "int[] tensor_ids, int[] layouts, int qmin, int qmax, float offset, int r, str distribution, "
        "float noise_scale, float epsilon, str rule, float[] hyperparameters, float lr, int count) -> ()");
  m.def(
      "quantize(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, int qmin, int qmax, float offset, int r) "
      "-> ()");
  m.def("straight_through_backward(Tensor(a!)[] out, Tensor[] grads, Tensor[] latents, Tensor[] alphas, "
        "int qmin, int qmax, float offset, int r, str kind, bool clip) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fogzo_cpu, CompositeExplicitAutograd, m) {
  m.impl("noise", TORCH_BOX(&noise));
  m.impl("guide_sumsq", TORCH_BOX(&guide_sumsq));
  m.impl("perturb_quantize", TORCH_BOX(&perturb_quantize));
  m.impl("estimate_gradient", TORCH_BOX(&estimate_gradient));
  m.impl("estimate_update", TORCH_BOX(&estimate_update));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("straight_through_backward", TORCH_BOX(&straight_through_backward));
}

} // namespace fogzo::cpu
