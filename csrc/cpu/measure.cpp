// The op that makes alphas from data, over lists of tensors: as those of ops.cpp.
#include "blocks.h"

#include <limits>

namespace fogzo::cpu {
namespace {

// Whole cells of a tensor, as many as lie in kBlock elements, or a piece of one that is longer.
struct Part {
  const Item *item;
  int64_t begin, end;
};

// Where they are cut depends on sizes alone, so that sums do not depend on threads.
std::vector<Part> make_parts(const std::vector<Item> &items) {
  std::vector<Part> parts;
  for (const Item &item : items) {
    const int64_t length = item.scale_length, step = length > kBlock ? kBlock : kBlock / length * length;
    for (int64_t cell = 0; length > kBlock && cell < item.numel; cell += length)
      for (int64_t begin = cell; begin < cell + length; begin += step)
        parts.push_back({&item, begin, std::min(cell + length, begin + step)});
    for (int64_t begin = 0; length <= kBlock && begin < item.numel; begin += step)
      parts.push_back({&item, begin, std::min(item.numel, begin + step)});
  }
  return parts;
}

// The alphas of cells in pieces, from what these come to.
template <Statistic S>
void join_pieces(const std::vector<Part> &parts, const std::vector<double> &totals, const Measure &measure) {
  double total = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto &[item, begin, end] = parts[i];
    if (item->scale_length <= kBlock)
      continue;
    total = begin % item->scale_length ? joined<S>(total, totals[i]) : totals[i];
    if (end % item->scale_length == 0)
      static_cast<float *>(item->plus.data)[begin / item->scale_length] =
          alpha_of(statistic_of<S>(total, item->scale_length), measure);
  }
}

// A number that float32 holds, `low` or more.
float float_in(double value, float low, const char *name) {
  constexpr float high = std::numeric_limits<float>::max();
  FOGZO_CHECK(value >= low && value <= high, name, " must be in ", low, "..", high, ", got ", value);
  return float(value);
}

void measure_alphas(Arguments a) {
  const Tensors alphas = a.tensors(), tensors = a.tensors();
  const std::string name = a.text();
  const double factor = a.number(), add = a.number(), least = a.number();
  const Measure measure{value_of<Statistic, Refusal>(name, "statistic"),
                        float_in(factor, std::numeric_limits<float>::min(), "factor"),
                        float_in(add, 0.0f, "add"), float_in(least, 0.0f, "least")};
  check_list(tensors, "tensors", kFloats);
  check_length(alphas, tensors.size(), "alphas");
  check_shapes_of_alphas(alphas, tensors);
  Memory memory;
  memory.writes(alphas, "alphas");
  memory.reads(tensors, "tensors");
  memory.check();

  const Kernels &run = kernels();
  std::vector<Item> items = make_items(tensors, alphas);
  set_spans(items, &Item::latent, tensors);
  set_spans(items, &Item::plus, alphas);
  for (size_t i = 0; i < items.size(); ++i)
    if (!items[i].numel) // its cells hold nothing
      std::fill_n(alphas[i].at<float>(), alphas[i].numel, alpha_of(0.0f, measure));
  const std::vector<Part> parts = make_parts(items);
  std::vector<double> totals(parts.size());
  torch::stable::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part &part = parts[i];
      if (part.item->scale_length > kBlock)
        totals[i] = run.total(*part.item, measure.statistic, part.begin, part.end);
      else
        run.measure(*part.item, measure, part.begin, part.end);
    }
  });
  with_value(measure.statistic, [&](auto S) { join_pieces<decltype(S)::value>(parts, totals, measure); });
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fogzo_cpu, m) {
  m.def("measure_alphas(Tensor(a!)[] alphas, Tensor[] tensors, str statistic, float factor, float add, float "
        "least) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fogzo_cpu, CompositeExplicitAutograd, m) {
  m.impl("measure_alphas", boxed<measure_alphas>);
}

} // namespace fogzo::cpu
