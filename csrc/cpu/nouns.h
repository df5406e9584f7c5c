// What travels together, as in fogzo_kernels/spec/call.py: each reads its arguments in the schema's order, and
// checks them.
#pragma once

#include "kernels.h"
#include "lists.h"

namespace fogzo::cpu {

// Which noise, but for the direction.
#define FOGZO_DRAW                                                                                             \
  "str distribution, float noise_scale, Tensor seed, Tensor step, int[] tensor_ids, int[] layouts"

struct Draw {
  std::string name;
  double C; // u = C m
  Tensor seed_tensor, step_tensor;
  Ints tensor_ids, layouts; // layouts: offset, inner and stride of each tensor, one after the other
  Distribution distribution{};
  int64_t seed = 0, step = 0;

  explicit Draw(Arguments &a)
      : name(a.text()), C(a.number()), seed_tensor(a.tensor()), step_tensor(a.tensor()),
        tensor_ids(a.integers()), layouts(a.integers()) {}

  // For the first `count` of `like`. A number cut to its lower bits would name other noise.
  void check(const Tensors &like, size_t count) {
    distribution = value_of<Distribution, Refusal>(name, "distribution");
    seed = scalar<int64_t>(seed_tensor, "seed", Type::int64);
    step = scalar<int64_t>(step_tensor, "step", Type::int64);
    check_range(step, 0, kMaxStep - 1, "step");
    FOGZO_CHECK(tensor_ids.size() == count, "tensor_ids must have ", count, " entries, got ",
                tensor_ids.size());
    FOGZO_CHECK(layouts.size() == 3 * count, "layouts must have ", 3 * count, " entries, got ", layouts.size());
    for (size_t i = 0; i < count; ++i) {
      check_range(tensor_ids[i], 0, kMaxTensorId - 1, {"tensor_ids", i});
      check_layout(layouts.data() + 3 * i, like[i].numel, i);
    }
    check_names_differ(like);
  }

  Noise noise(int64_t direction) const {
    return {distribution, {uint64_t(seed), uint32_t(step), uint32_t(direction), 0}};
  }

  void name_items(std::vector<Item> &items) const {
    for (size_t i = 0; i < tensor_ids.size(); ++i) {
      items[i].layout = {layouts[3 * i], layouts[3 * i + 1], layouts[3 * i + 2]};
      items[i].tensor_id = uint32_t(tensor_ids[i]);
    }
  }

private:
  static void check_layout(const int64_t *layout, int64_t numel, size_t i) {
    const int64_t offset = layout[0], inner = layout[1], stride = layout[2];
    const int64_t rows = inner >= 1 && numel > inner ? (numel - 1) / inner : 0;
    FOGZO_CHECK(offset >= 0 && inner >= 1 && stride >= 1 && (rows == 0 || stride >= inner), Name("layouts", i),
                " must be (offset >= 0, inner >= 1, stride >= inner), got (", offset, ", ", inner, ", ", stride,
                ")");
    const int64_t columns = std::min(inner, std::max<int64_t>(numel, 1)); // by division: a product may overflow
    FOGZO_CHECK(columns <= kMaxElement && offset <= kMaxElement - columns &&
                    (rows == 0 || stride <= (kMaxElement - columns - offset) / rows),
                Name("layouts", i), " must keep element indices below 2^51, got (", offset, ", ", inner, ", ",
                stride, ") for ", numel, " elements");
  }

  // No two tensors that hold something draw the same noise: one id at one offset.
  void check_names_differ(const Tensors &like) const {
    bool rising = true;
    for (size_t i = 1; rising && i < tensor_ids.size(); ++i)
      rising = tensor_ids[i - 1] < tensor_ids[i];
    if (rising)
      return;
    struct Place {
      int64_t id, offset;
      size_t index;
      bool operator<(const Place &other) const {
        return id != other.id           ? id < other.id
               : offset != other.offset ? offset < other.offset
                                        : index < other.index;
      }
    };
    std::vector<Place> places;
    for (size_t i = 0; i < tensor_ids.size(); ++i)
      if (like[i].numel)
        places.push_back({tensor_ids[i], layouts[3 * i], i});
    std::sort(places.begin(), places.end());
    for (size_t k = 1; k < places.size(); ++k) {
      const Place &one = places[k], &other = places[k - 1];
      FOGZO_CHECK(one.id != other.id || one.offset != other.offset, Name("tensor_ids", one.index),
                  " must differ from ", Name("tensor_ids", other.index),
                  " unless the two are shards at different offsets, got ", one.id, " at offset ", one.offset,
                  " for both");
    }
  }
};

// How noise and guide make v, and how far the probes go.
#define FOGZO_MIX "Tensor norm, Tensor one_minus_beta, float epsilon"

struct Mix {
  Tensor norm_tensor, one_minus_beta_tensor;
  double epsilon;
  float norm = 0.0f;
  double one_minus_beta = 0.0;

  explicit Mix(Arguments &a)
      : norm_tensor(a.tensor()), one_minus_beta_tensor(a.tensor()), epsilon(a.number()) {}

  void check() {
    norm = scalar<float>(norm_tensor, "norm", Type::float32);
    one_minus_beta = scalar<double>(one_minus_beta_tensor, "one_minus_beta", Type::float64);
    FOGZO_CHECK(0.0 <= one_minus_beta && one_minus_beta <= 1.0, "one_minus_beta must be in 0..1, got ",
                one_minus_beta);
  }

  // a / N of the contract: 0 unless N is finite and > 0
  double over_norm(double numerator) const { return std::isfinite(norm) && norm > 0 ? numerator / norm : 0.0; }
};

// What the probes found. `counters` is one tensor or none: lost directions, lost norms, bad alphas.
#define FOGZO_LOSSES "Tensor losses_plus, Tensor losses_minus"

struct Losses {
  Tensor plus, minus;
  const Tensors &counters;

  Losses(Arguments &a, const Tensors &counters) : plus(a.tensor()), minus(a.tensor()), counters(counters) {}

  void check(int64_t least) const {
    for (const auto &[name, t] : {std::pair("losses_plus", &plus), std::pair("losses_minus", &minus)}) {
      FOGZO_CHECK(t->type == Type::float32 && t->dim == 1 && t->fault != Fault::strides, name,
                  " must be a contiguous float32 tensor of shape (n,), got ", text_of(t->type), " ", Shape{*t});
      check_tensor(*t, name, bit(Type::float32));
    }
    FOGZO_CHECK(least <= plus.numel && plus.numel <= kMaxDirection, "losses_plus must have ", least, "..",
                kMaxDirection, " entries, got ", plus.numel);
    FOGZO_CHECK(same_shape(minus, plus), "losses_minus must have shape ", Shape{plus}, ", got ", Shape{minus});
    FOGZO_CHECK(counters.size() <= 1, "counters must have at most 1 tensor, got ", counters.size());
    for (const Tensor &t : counters) {
      FOGZO_CHECK(t.type == Type::int64 && t.dim == 1 && t.numel == 3 && t.fault != Fault::strides,
                  "counters must be an int64 tensor of shape (3,), got ", text_of(t.type), " ", Shape{t});
      check_tensor(t, "counters", bit(Type::int64));
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

  void touch(Memory &memory) const {
    memory.writes(counters, "counters");
    memory.reads(plus, "losses_plus");
    memory.reads(minus, "losses_minus");
  }
};

// The values that a weight may take.
#define FOGZO_GRID "int qmin, int qmax, float offset, int r, int block"

struct Grid {
  int64_t qmin, qmax;
  double offset;
  int64_t r;
  int64_t block; // of the transform

  explicit Grid(Arguments &a)
      : qmin(a.integer()), qmax(a.integer()), offset(a.number()), r(a.integer()), block(a.integer()) {}

  // Codes fit in int8, so that their conversion from float32 is defined.
  void check() const {
    check_range(qmin, -128, 127, "qmin");
    check_range(qmax, qmin, 127, "qmax");
    FOGZO_CHECK(offset == 0.0 || offset == 0.5, "offset must be 0 or 0.5, got ", offset);
    check_range(r, 1, 2, "r");
  }

  GridRange range() const { return {float(qmin), float(qmax), float(offset)}; }
};

// The optimizer's rule and this step's numbers.
#define FOGZO_UPDATE "str rule, str[] names, float[] values, Tensor lr, Tensor optimizer_step"

struct Optimizer {
  std::string name;
  std::vector<std::string> names; // of hyperparameters
  std::vector<double> values;
  Tensor lr_tensor, count_tensor;
  Update update{};

  explicit Optimizer(Arguments &a)
      : name(a.text()), names(a.texts()), values(a.numbers()), lr_tensor(a.tensor()), count_tensor(a.tensor()) {
  }

  void check() {
    const Rule rule = value_of<Rule, Refusal>(name, "rule");
    FOGZO_CHECK(names.size() == values.size(), "values must have ", names.size(), " numbers, one for each of",
                " names, got ", values.size());
    std::vector<std::pair<std::string, double>> pairs;
    for (size_t i = 0; i < names.size(); ++i)
      pairs.emplace_back(names[i], values[i]);
    const Hyperparameters h = hyperparameters_of<Refusal>(pairs);
    const double lr = scalar<double>(lr_tensor, "lr", Type::float64);
    const int64_t count = scalar<int64_t>(count_tensor, "optimizer_step", Type::int64);
    FOGZO_CHECK(lr >= 0 && std::isfinite(lr), "lr must be finite and >= 0, got ", lr);
    FOGZO_CHECK(count >= 1, "optimizer_step must be >= 1, got ", count);
    update = update_of(rule, h);
    update.size = step_size(rule, h, lr, double(count));
    update.decay = step_decay(rule, h, lr, double(count));
    update.root = step_root(rule, h, double(count));
  }
};

} // namespace fogzo::cpu
