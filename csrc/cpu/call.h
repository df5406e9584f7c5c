// Arguments that go together, as in fogzo_kernels/spec/call.py: each group reads its own in the schema's order,
// and checks them.
#pragma once

#include "lists.h"

namespace fogzo::cpu {

// Which noise, but for the direction.
#define FOGZO_DRAW                                                                                             \
  "str distribution, float noise_scale, Tensor seed, Tensor step, int[] tensor_ids, int[] layouts"

struct Draw {
  std::string name;
  double C; // u = C m
  Tensor seed_tensor, step_tensor;
  Ints tensor_ids, layouts; // both empty: those of a list that Python prepared
  Distribution distribution{};
  int64_t seed = 0, step = 0;

  explicit Draw(Arguments &a)
      : name(a.text()), C(a.number()), seed_tensor(a.tensor()), step_tensor(a.tensor()),
        tensor_ids(a.integers()), layouts(a.integers()) {}

  void check() {
    distribution = value_of<Distribution>(name, "distribution");
    seed = scalar<int64_t>(seed_tensor, Type::int64);
    step = scalar<int64_t>(step_tensor, Type::int64);
    require(0 <= step && step < kMaxStep, "step");
  }

  // What set_names() depends on beside the tensors, with another number.
  Ints key(int64_t number) const {
    Ints key{number, int64_t(tensor_ids.size())};
    key.insert(key.end(), tensor_ids.begin(), tensor_ids.end());
    key.insert(key.end(), layouts.begin(), layouts.end());
    return key;
  }

  // Names the noise of the first `count` items, those of `like`. A number cut to its lower bits would name
  // other noise.
  void set_names(std::vector<Operands> &items, const Tensors &like, size_t count) const {
    const bool own = like.generation && tensor_ids.empty() && layouts.empty();
    const Ints &ids = own ? like.tensor_ids : tensor_ids, &places = own ? like.layouts : layouts;
    require(own ? count <= ids.size() : ids.size() == count && places.size() == 3 * count, "length");
    for (size_t i = 0; i < count; ++i) {
      Operands &item = items[i];
      require(0 <= ids[i] && ids[i] < kMaxTensorId, "tensor_ids");
      item.tensor_id = uint32_t(ids[i]);
      item.layout = {places[3 * i], places[3 * i + 1], places[3 * i + 2]};
      const auto [offset, inner, stride] = item.layout;
      require(valid(item.layout, item.numel), "layouts");
      require(!item.block || !item.numel ||
                  (offset % item.block == 0 && inner % item.block == 0 && stride % item.block == 0),
              "layouts");
    }
    require(names_differ(items, count), "tensor_ids");
  }

  Noise noise(int64_t direction) const {
    require(0 <= direction && direction < kMaxDirection, "direction");
    return {distribution, {uint64_t(seed), uint32_t(step), uint32_t(direction), 0}};
  }

private:
  // Rows do not overlap, and element indices stay below 2^51; by division, as a product may overflow.
  static bool valid(const Layout &layout, int64_t numel) {
    const auto [offset, inner, stride] = layout;
    if (offset < 0 || inner < 1 || stride < 1)
      return false;
    const int64_t rows = numel > inner ? (numel - 1) / inner : 0;
    const int64_t columns = std::min(inner, std::max<int64_t>(numel, 1));
    return columns <= kMaxElement && offset <= kMaxElement - columns &&
           (rows == 0 || (stride >= inner && stride <= (kMaxElement - columns - offset) / rows));
  }

  // No two of the first `count` that hold something draw the same noise: one id at one offset.
  static bool names_differ(const std::vector<Operands> &items, size_t count) {
    const auto last = items.begin() + int64_t(count);
    const auto rises = [](const Operands &x, const Operands &y) { return x.tensor_id < y.tensor_id; };
    if (std::adjacent_find(items.begin(), last, std::not_fn(rises)) == last)
      return true;
    std::vector<std::pair<uint32_t, int64_t>> names;
    for (auto item = items.begin(); item != last; ++item)
      if (item->numel)
        names.emplace_back(item->tensor_id, item->layout.offset);
    std::sort(names.begin(), names.end());
    return std::adjacent_find(names.begin(), names.end()) == names.end();
  }
};

// How noise and guide make v, and how far the probes go.
// `factors` is one tensor or none: t of each tensor with noise.
#define FOGZO_MIX "Tensor norm, Tensor one_minus_beta, float epsilon, Tensor[] factors"

struct Mix {
  Tensor norm_tensor, one_minus_beta_tensor;
  double epsilon;
  const Tensors &factors;
  float norm = 0.0f;
  double one_minus_beta = 0.0;

  explicit Mix(Arguments &a)
      : norm_tensor(a.tensor()), one_minus_beta_tensor(a.tensor()), epsilon(a.number()),
        factors(a.given_tensors()) {}

  // `count`: how many tensors have noise.
  void check(const Memory &memory, size_t count) {
    require(factors.size() <= 1, "length");
    for (const Tensor &t : factors) {
      check_tensor(t, bit(Type::float32));
      require(t.dim == 1 && t.numel == int64_t(count), "noise_factors");
      const float *const begin = t.at<const float>();
      require(std::all_of(begin, begin + count, [](float x) { return 0.0f <= x && std::isfinite(x); }),
              "noise_factors");
      memory.check(t, false);
    }
    norm = scalar<float>(norm_tensor, Type::float32);
    one_minus_beta = scalar<double>(one_minus_beta_tensor, Type::float64);
    require(0.0 <= one_minus_beta && one_minus_beta <= 1.0, "one_minus_beta");
    memory.check(norm_tensor, false);
  }

  // t of tensor i
  float factor(size_t i) const { return factors.empty() ? 1.0f : factors[0].at<const float>()[i]; }

  // a / N of the contract: 0 unless N is finite and > 0
  double over_norm(double numerator) const { return std::isfinite(norm) && norm > 0 ? numerator / norm : 0.0; }
};

// What the probes returned. `counters` is one tensor or none: lost directions, lost norms, bad alphas.
// `guided`: there were no probes, and noise is in proportion to N.
#define FOGZO_LOSSES "Tensor losses_plus, Tensor losses_minus, Tensor(z!)[] counters, bool guided"

struct Losses {
  Tensor plus, minus;
  const Tensors &counters;
  bool guided;

  explicit Losses(Arguments &a)
      : plus(a.tensor()), minus(a.tensor()), counters(a.given_tensors()), guided(a.boolean()) {}

  void check(int64_t least, const Memory &memory, const Mix &mix) const {
    for (const Tensor *t : {&plus, &minus}) {
      check_tensor(*t, bit(Type::float32));
      require(t->dim == 1 && t->numel == plus.numel, "losses");
      memory.check(*t, false);
    }
    require((guided ? 0 : least) <= n() && n() <= (guided ? 0 : kMaxDirection), "losses");
    require(counters.size() <= 1, "length");
    for (const Tensor &t : counters) {
      check_tensor(t, bit(Type::int64));
      require(t.dim == 1 && t.numel == 3, "shape");
      memory.check(t, true);
      Memory scalars;
      for (const auto &[scalar, written] :
           {std::pair{&t, true}, {&plus, false}, {&minus, false}, {&mix.norm_tensor, false}})
        scalars.add(*scalar, written);
      for (const Tensor &factor : mix.factors)
        scalars.add(factor, false);
      scalars.check();
    }
  }

  int64_t n() const { return plus.numel; }

  // adds to the counters: lost directions, lost norms
  void count(int64_t directions, int64_t norms) const {
    for (const Tensor &t : counters) {
      int64_t *const counts = t.at<int64_t>();
      counts[0] += directions;
      counts[1] += norms;
    }
  }
};

// The values that a weight may take.
#define FOGZO_GRID "int qmin, int qmax, float offset, int r"

struct Grid {
  int64_t qmin, qmax;
  double offset;
  int64_t r;

  explicit Grid(Arguments &a) : qmin(a.integer()), qmax(a.integer()), offset(a.number()), r(a.integer()) {}

  // Codes fit in int8, so that their conversion from float32 is defined.
  GridRange range() const {
    require(-128 <= qmin && qmin <= qmax && qmax <= 127 && (offset == 0.0 || offset == 0.5), "grid");
    return {float(qmin), float(qmax), float(offset)};
  }
};

// The optimizer's rule, this step's numbers and its memory.
#define FOGZO_UPDATE                                                                                           \
  "str rule, str[] names, float[] values, Tensor lr, Tensor optimizer_step, Tensor(w!)[] masters, "            \
  "Tensor(x!)[] first, Tensor(y!)[] second"

struct Optimizer {
  std::string name;
  std::vector<std::string> names; // of hyperparameters
  std::vector<double> values;
  Tensor lr_tensor, count_tensor;
  const Tensors &masters, &first, &second;
  Rule rule{};

  explicit Optimizer(Arguments &a)
      : name(a.text()), names(a.texts()), values(a.numbers()), lr_tensor(a.tensor()), count_tensor(a.tensor()),
        masters(a.tensors()), first(a.tensors()), second(a.tensors()) {}

  void set(Lists &lists) const {
    const size_t all = lists.items.size();
    lists.write(&Operands::master, masters, kFloat32, masters.empty() ? 0 : all);
    require(masters.empty() || lists.items[0].latent.dtype != Dtype::float32, "dtype");
    lists.write(&Operands::first, first, kFloat32, states_of(rule) > 0 ? all : 0);
    lists.write(&Operands::second, second, kFloat32, states_of(rule) > 1 ? all : 0);
  }

  Update check() {
    rule = value_of<Rule>(name, "rule");
    require(names.size() == values.size(), "length");
    std::vector<std::pair<std::string, double>> pairs;
    for (size_t i = 0; i < names.size(); ++i)
      pairs.emplace_back(names[i], values[i]);
    const Hyperparameters h = hyperparameters_of(pairs);
    const double lr = scalar<double>(lr_tensor, Type::float64);
    const int64_t count = scalar<int64_t>(count_tensor, Type::int64);
    require(lr >= 0 && std::isfinite(lr), "lr");
    require(count >= 1, "optimizer_step");
    Update update = update_of(rule, h);
    update.size = step_size(rule, h, lr, double(count));
    update.decay = step_decay(rule, h, lr, double(count));
    update.root = step_root(rule, h, double(count));
    return update;
  }
};

} // namespace fogzo::cpu
