// CPU ops over lists of tensors: read the arguments, check them all, cut tensors into ranges, spread these over
// threads, call the kernels. Registered through the LibTorch stable ABI, so that one build serves several torch
// releases.
#include "call.h"
#include "inspect.h"

#include <functional>
#include <limits>

namespace fogzo::cpu {
namespace {

// ---- lists that Python prepares

// Keeps a list for calls to come, until release(); without names for noise, those of whole parameters 0, 1, ...
void hold(StableIValue *stack, uint64_t, uint64_t) {
  Arguments a(stack);
  std::vector<Handle> handles = a.handles();
  Ints tensor_ids = a.integers(), layouts = a.integers();
  require(tensor_ids.empty() || tensor_ids.size() == handles.size(), "length");
  require(layouts.empty() || layouts.size() == 3 * handles.size(), "length");
  auto list = std::make_shared<HeldList>(std::move(handles), std::move(tensor_ids), std::move(layouts));
  *stack = torch::stable::detail::from(HeldLists::all().add(std::move(list)));
}

// ---- noise and guide norm

void noise(Arguments a) {
  Tensors out;
  out.push_back(a.tensor());
  Draw draw(a);
  const int64_t direction = a.integer();
  draw.check();
  Lists lists(out);
  lists.write(&Operands::plus, out, kFloat32);
  draw.set_names(lists.items, out, 1);

  run(kernels().noise, lists.items, draw.noise(direction), float(draw.C));
}

void guide_sumsq(Arguments a) {
  const Tensor out = a.tensor();
  const Tensors &grads = a.tensors(), &alphas = a.tensors();
  const int64_t r = a.integer();
  const bool per_tensor = out.dim == 1;
  check_tensor(out, bit(Type::float64));
  require(out.numel == (per_tensor ? int64_t(grads.size()) : 1) && out.dim <= 1, "shape");
  const auto lists = lists_of(a, grads, {}, [&](Lists &lists) {
    lists.read(&Operands::grad, grads, kFloats);
    lists.set_cells(alphas, grads.size(), false);
  });
  check_alphas(alphas, r);

  const Kernels &best = kernels();
  const std::vector<Range> ranges = make_ranges(lists->items);
  std::vector<double> partial(ranges.size());
  for_each(ranges, [&](int64_t i, const Range &range) {
    partial[i] = best.sumsq(*range.item, float(r), range.begin, range.end);
  });
  double *const sums = out.at<double>();
  std::fill_n(sums, out.numel, 0.0);
  for (size_t i = 0; i < ranges.size(); ++i)
    sums[per_tensor ? ranges[i].item - lists->items.data() : 0] += partial[i];
}

// ---- perturb and quantize

void perturb_quantize(Arguments a) {
  const Tensors &plus = a.tensors(), &minus = a.tensors(), &latents = a.tensors(), &grads = a.tensors(),
                &alphas = a.tensors();
  Draw draw(a);
  Mix mix(a);
  const int64_t direction = a.integer();
  const Grid grid(a);
  const int64_t block = a.integer();
  const auto lists = lists_of(a, latents, draw.key(block), [&](Lists &lists) {
    const size_t count = latents.size();
    lists.read(&Operands::latent, latents, kFloats);
    lists.read(&Operands::grad, grads, kFloats);
    require(!count || !plus.empty() || !minus.empty(), "length");
    lists.write(&Operands::plus, plus, kOutputs, plus.empty() ? 0 : count);
    lists.write(&Operands::minus, minus, plus.empty() ? kOutputs : bit(plus[0].type),
                minus.empty() ? 0 : count);
    lists.set_cells(alphas, count, false);
    lists.set_transform(block, count);
    draw.set_names(lists.items, latents, count);
  });
  check_alphas(alphas, grid.r);
  draw.check();
  mix.check(lists->memory, latents.size());

  const Noise what = draw.noise(direction);
  const float sign = direction_sign(what.names.seed, what.names.step, what.names.direction);
  const Perturbation p{what,
                       grid.range(),
                       float(grid.r),
                       float(mix.over_norm(float(std::sqrt(1.0 - mix.one_minus_beta)) * sign)),
                       float(std::sqrt(mix.one_minus_beta) * draw.C),
                       float(mix.epsilon)};
  run_each(kernels().perturb, lists->items, p, [&](Perturbation &own, size_t i) { own.b *= mix.factor(i); });
}

// ---- estimate

// A and B of the contract, from the losses. Not usable: the step is lost and g keeps the STE gradient.
struct Coefficients {
  float A = 0.0f;
  std::vector<float> B, scaled; // scaled: B times t of each tensor, in a row; empty where all t are 1
  bool usable = false;

  void scale(const Tensors &factors) {
    for (const Tensor &t : factors)
      for (int64_t i = 0; i < t.numel; ++i)
        for (const float b : B)
          scaled.push_back(b * t.at<const float>()[i]);
  }

  const float *of_tensor(size_t i) const { return scaled.empty() ? B.data() : scaled.data() + i * B.size(); }
};

// Counts what is lost.
Coefficients coefficients_of(const Draw &draw, const Mix &mix, const Losses &losses) {
  Coefficients c;
  const int64_t n = losses.n();
  const bool norm_lost = !std::isfinite(mix.norm);
  if (losses.guided) { // c = N, and s = 1
    c.A = float(mix.over_norm(mix.norm * std::sqrt(1.0 - mix.one_minus_beta)));
    c.B.push_back(float(mix.norm * std::sqrt(mix.one_minus_beta) * draw.C));
    c.scale(mix.factors);
    losses.count(0, norm_lost);
    c.usable = !norm_lost;
    return c;
  }
  const float *plus = losses.plus.at<const float>(), *minus = losses.minus.at<const float>();
  double sum = 0;
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    double slope = (double(plus[i]) - double(minus[i])) / (2.0 * double(float(mix.epsilon)));
    if (!std::isfinite(float(slope))) {
      slope = 0;
      ++lost;
    }
    sum += slope * direction_sign(uint64_t(draw.seed), uint32_t(draw.step), uint32_t(i));
    c.B.push_back(float(slope * std::sqrt(mix.one_minus_beta) * draw.C / double(n)));
  }
  c.scale(mix.factors);
  c.A = float(mix.over_norm(sum * std::sqrt(1.0 - mix.one_minus_beta) / double(n)));
  losses.count(lost, norm_lost); // the third counter, of bad alphas, stays: they are refused
  c.usable = lost < n && !norm_lost;
  return c;
}

void estimate_gradient(Arguments a) {
  const Tensors &grads = a.tensors(), &alphas = a.tensors();
  Draw draw(a);
  Mix mix(a);
  const Losses losses(a);
  const int64_t r = a.integer(), block = a.integer();
  const auto lists = lists_of(a, grads, draw.key(block), [&](Lists &lists) {
    lists.write(&Operands::grad, grads, kFloats);
    lists.set_cells(alphas, grads.size(), false);
    lists.set_transform(block, grads.size());
    draw.set_names(lists.items, grads, grads.size());
  });
  check_alphas(alphas, r);
  draw.check();
  mix.check(lists->memory, grads.size());
  losses.check(1, lists->memory, mix);

  const auto estimate = kernels().estimate;
  const Coefficients c = coefficients_of(draw, mix, losses);
  if (!c.usable)
    return;
  const Estimate e{draw.noise(0), float(r), c.A, c.B.data(), int64_t(c.B.size())};
  run_each(estimate, lists->items, e, [&](Estimate &own, size_t i) { own.B = c.of_tensor(i); });
}

// ---- the fused tail

// The first alphas.size() of the latents are quantized, the others have no alpha.
void estimate_update(Arguments a) {
  const Tensors &latents = a.tensors(), &quantized = a.tensors(), &grads = a.tensors(), &alphas = a.tensors();
  Draw draw(a);
  Mix mix(a);
  const Losses losses(a);
  const Grid grid(a);
  Optimizer optimizer(a);
  const int64_t block = a.integer();
  const Update update = optimizer.check();
  Ints key = draw.key(block);
  key.push_back(states_of(optimizer.rule));
  const auto lists = lists_of(a, latents, std::move(key), [&](Lists &lists) {
    const size_t quantizing = alphas.size();
    lists.write(&Operands::latent, latents, kFloats);
    lists.read(&Operands::grad, grads, kFloats);
    optimizer.set(lists);
    require(quantizing <= latents.size(), "length");
    lists.write(&Operands::plus, quantized, kOutputs, quantized.empty() ? 0 : quantizing);
    lists.set_cells(alphas, quantizing, false);
    lists.set_transform(block, quantizing);
    draw.set_names(lists.items, latents, quantizing);
  });
  check_alphas(alphas, grid.r);
  draw.check();
  mix.check(lists->memory, alphas.size());
  losses.check(0, lists->memory, mix);

  const auto update_latents = kernels().update;
  Tail tail{{draw.noise(0), float(grid.r), 1.0f, nullptr, 0}, update, grid.range(), false};
  Coefficients c;
  if (losses.n() || losses.guided) {
    tail.skip = !std::isfinite(mix.norm);
    c = coefficients_of(draw, mix, losses);
  }
  if (c.usable) {
    tail.estimate.A = c.A;
    tail.estimate.directions = int64_t(c.B.size());
  }
  run_each(update_latents, lists->items, tail,
           [&](Tail &own, size_t i) { own.estimate.B = i < alphas.size() ? c.of_tensor(i) : nullptr; });
}

// ---- quantize and its straight-through derivative

void quantize(Arguments a) {
  const Tensors &out = a.tensors(), &latents = a.tensors(), &alphas = a.tensors();
  const Grid grid(a);
  const int64_t block = a.integer();
  const auto lists = lists_of(a, latents, {block}, [&](Lists &lists) {
    lists.read(&Operands::latent, latents, kFloats);
    lists.write(&Operands::plus, out, kOutputs);
    lists.set_cells(alphas, latents.size(), false);
    lists.set_transform(block, latents.size());
  });
  check_alphas(alphas, grid.r);

  run(kernels().quantize, lists->items, grid.range(), float(grid.r));
}

void straight_through_backward(Arguments a) {
  const Tensors &out = a.tensors(), &grads = a.tensors(), &latents = a.tensors(), &alphas = a.tensors();
  const Grid grid(a);
  const std::string name = a.text();
  const int64_t block = a.integer();
  const auto what = value_of<StraightThrough>(name, "straight_through");
  const auto lists = lists_of(a, latents, {block}, [&](Lists &lists) {
    lists.read(&Operands::latent, latents, kFloats);
    lists.write(&Operands::plus, out, kFloats);
    lists.read_in_place(&Operands::grad, grads, kFloats, out);
    lists.set_cells(alphas, latents.size(), false);
    lists.set_transform(block, latents.size());
  });
  check_alphas(alphas, grid.r);

  run(kernels().straight_through, lists->items, what, grid.range(), float(grid.r));
}

void learned_backward(Arguments a) {
  const Tensors &out = a.tensors(), &alpha_grads = a.tensors(), &grads = a.tensors(), &latents = a.tensors(),
                &alphas = a.tensors();
  const Grid grid(a);
  const std::string name = a.text();
  const std::vector<double> factors = a.numbers();
  const int64_t block = a.integer();
  const auto what = value_of<StraightThrough>(name, "straight_through");
  const size_t count = latents.size();
  Ints key(1 + factors.size(), block);
  std::copy_n(reinterpret_cast<const char *>(factors.data()), factors.size() * sizeof(double),
              reinterpret_cast<char *>(key.data() + 1));
  const auto lists = lists_of(a, latents, std::move(key), [&](Lists &lists) {
    lists.read(&Operands::latent, latents, kFloats);
    lists.write(&Operands::plus, out, kFloats);
    lists.read_in_place(&Operands::grad, grads, kFloats, out);
    lists.set_cells(alphas, count, false);
    lists.set_transform(block, count);
    check_list(alpha_grads, kFloat32, alphas, count);
    require(factors.size() == count, "length");
    for (size_t i = 0; i < count; ++i) {
      require(std::isfinite(factors[i]), "factors");
      lists.memory.add(alpha_grads[i], true);
      lists.items[i].alpha_grad = alpha_grads[i].at<float>();
      lists.items[i].factor = factors[i];
    }
  });
  check_alphas(alphas, grid.r);
  const GridRange values = grid.range();

  for (size_t i = 0; i < count; ++i)
    if (!latents[i].numel)
      std::fill_n(alpha_grads[i].at<float>(), alpha_grads[i].numel, 0.0f);
  run_learned(lists->items, what, values, float(grid.r));
}

// ---- alphas from data

// Whole cells of a tensor, as many as lie in kRange elements, or a piece of one that is longer. Where they are
// cut depends on sizes alone, so that sums do not depend on threads.
std::vector<Range> ranges_of_cells(const std::vector<Operands> &items) {
  std::vector<Range> ranges;
  for (const Operands &item : items) {
    const int64_t length = item.scale_length, step = length > kRange ? kRange : kRange / length * length;
    for (int64_t cell = 0; length > kRange && cell < item.numel; cell += length)
      for (int64_t begin = cell; begin < cell + length; begin += step)
        ranges.push_back({&item, begin, std::min(cell + length, begin + step)});
    for (int64_t begin = 0; length <= kRange && begin < item.numel; begin += step)
      ranges.push_back({&item, begin, std::min(item.numel, begin + step)});
  }
  return ranges;
}

// The alphas of cells in pieces, from what these come to.
template <Statistic S>
void join_pieces(const std::vector<Range> &ranges, const std::vector<double> &totals, const Measure &measure) {
  double total = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto &[item, begin, end] = ranges[i];
    if (item->scale_length <= kRange)
      continue;
    total = begin % item->scale_length ? joined<S>(total, totals[i]) : totals[i];
    if (end % item->scale_length == 0)
      static_cast<float *>(item->plus.data)[begin / item->scale_length] =
          alpha_of(statistic_of<S>(total, item->scale_length), measure);
  }
}

// A number that float32 holds, `low` or more.
float float_in(double value, float low) {
  require(value >= low && value <= std::numeric_limits<float>::max(), "measure");
  return float(value);
}

void measure_alphas(Arguments a) {
  const Tensors &alphas = a.tensors(), &tensors = a.tensors();
  const std::string name = a.text();
  const double factor = a.number(), add = a.number(), least = a.number();
  const Measure measure{value_of<Statistic>(name, "statistic"),
                        float_in(factor, std::numeric_limits<float>::min()), float_in(add, 0.0f),
                        float_in(least, 0.0f)};
  const auto lists = lists_of(a, tensors, {}, [&](Lists &lists) {
    lists.read(&Operands::latent, tensors, kFloats);
    lists.set_cells(alphas, tensors.size(), true);
    for (size_t i = 0; i < alphas.size(); ++i)
      lists.items[i].plus = {alphas[i].data, Dtype::float32};
  });

  const Kernels &best = kernels();
  for (size_t i = 0; i < alphas.size(); ++i)
    if (!tensors[i].numel) // its cells hold nothing
      std::fill_n(alphas[i].at<float>(), alphas[i].numel, alpha_of(0.0f, measure));
  const std::vector<Range> ranges = ranges_of_cells(lists->items);
  std::vector<double> totals(ranges.size());
  for_each(ranges, [&](int64_t i, const Range &range) {
    if (range.item->scale_length > kRange)
      totals[i] = best.total(*range.item, measure.statistic, range.begin, range.end);
    else
      best.measure(*range.item, measure, range.begin, range.end);
  });
  with_value(measure.statistic, [&](auto S) { join_pieces<decltype(S)::value>(ranges, totals, measure); });
}

// ---- the Hadamard transform

void hadamard(Arguments a) {
  const Tensors &out = a.tensors(), &tensors = a.tensors();
  const int64_t block = a.integer();
  const auto lists = lists_of(a, tensors, {block}, [&](Lists &lists) {
    lists.write(&Operands::plus, out, kFloats);
    lists.read_in_place(&Operands::latent, tensors, kFloats, out);
    lists.set_transform(block_of(block), tensors.size());
  });

  run(kernels().hadamard, lists->items);
}

} // namespace

// ---- schemas

// At the end of an op over lists: for each list the number that hold() gave, or 0 for the list that is given.
#define FOGZO_HELD ", int[] held=[]"

// In the order of the functions of Backend (fogzo_kernels/backends), with each group's arguments in a row.
STABLE_TORCH_LIBRARY(fogzo_cpu, m) {
  m.def("hold(Tensor[] tensors, int[] tensor_ids, int[] layouts) -> int");
  m.def("noise(Tensor(a!) out, " FOGZO_DRAW ", int direction) -> ()");
  m.def("guide_sumsq(Tensor(a!) out, Tensor[] grads, Tensor[] alphas, int r" FOGZO_HELD ") -> ()");
  m.def("perturb_quantize(Tensor(a!)[] plus, Tensor(b!)[] minus, Tensor[] latents, Tensor[] grads, "
        "Tensor[] alphas, " FOGZO_DRAW ", " FOGZO_MIX ", int direction, " FOGZO_GRID ", int block" FOGZO_HELD
        ") -> ()");
  m.def("estimate_gradient(Tensor(a!)[] grads, Tensor[] alphas, " FOGZO_DRAW ", " FOGZO_MIX ", " FOGZO_LOSSES
        ", int r, int block" FOGZO_HELD ") -> ()");
  m.def("estimate_update(Tensor(a!)[] latents, Tensor(b!)[] quantized, Tensor[] grads, Tensor[] "
        "alphas, " FOGZO_DRAW ", " FOGZO_MIX ", " FOGZO_LOSSES ", " FOGZO_GRID ", " FOGZO_UPDATE
        ", int block" FOGZO_HELD ") -> ()");
  m.def("quantize(Tensor(a!)[] out, Tensor[] latents, Tensor[] alphas, " FOGZO_GRID ", int block" FOGZO_HELD
        ") -> ()");
  m.def("straight_through_backward(Tensor(a!)[] out, Tensor[] grads, Tensor[] latents, Tensor[] "
        "alphas, " FOGZO_GRID ", str straight_through, int block" FOGZO_HELD ") -> ()");
  m.def("learned_backward(Tensor(a!)[] out, Tensor(b!)[] alpha_grads, Tensor[] grads, Tensor[] latents, "
        "Tensor[] alphas, " FOGZO_GRID ", str straight_through, float[] factors, int block" FOGZO_HELD
        ") -> ()");
  m.def("measure_alphas(Tensor(a!)[] alphas, Tensor[] tensors, str statistic, float factor, float add, float "
        "least" FOGZO_HELD ") -> ()");
  m.def("hadamard(Tensor(a!)[] out, Tensor[] tensors, int block" FOGZO_HELD ") -> ()");
  // no functions of Backend
  m.def("inspect(Tensor(a!) out, Tensor[] tensors" FOGZO_HELD ") -> ()");
  m.def("outside(Tensor[] tensors, Tensor[] least, float most" FOGZO_HELD ") -> int");
  m.def("add_one(Tensor(a!)[] counts" FOGZO_HELD ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fogzo_cpu, CompositeExplicitAutograd, m) {
  m.impl("hold", hold);
  m.impl("noise", boxed<noise>);
  m.impl("guide_sumsq", boxed_lists<guide_sumsq>);
  m.impl("perturb_quantize", boxed_lists<perturb_quantize>);
  m.impl("estimate_gradient", boxed_lists<estimate_gradient>);
  m.impl("estimate_update", boxed_lists<estimate_update>);
  m.impl("quantize", boxed_lists<quantize>);
  m.impl("straight_through_backward", boxed_lists<straight_through_backward>);
  m.impl("learned_backward", boxed_lists<learned_backward>);
  m.impl("measure_alphas", boxed_lists<measure_alphas>);
  m.impl("hadamard", boxed_lists<hadamard>);
  m.impl("inspect", boxed_lists<inspect>);
  m.impl("outside", [](StableIValue *stack, uint64_t inputs, uint64_t) {
    *stack = torch::stable::detail::from(outside(Arguments(stack, stack + inputs - 1)));
  });
  m.impl("add_one", boxed_lists<add_one>);
}

} // namespace fogzo::cpu
