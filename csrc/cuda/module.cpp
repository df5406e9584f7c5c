// pybind11: the CUDA ops on addresses, and how they were built. No torch: one build serves every release, and
// imports where there is no CUDA driver.
//
// Python gives tuples in the order of the structs' members (fogzo_kernels/backends/cuda.py). Each struct is
// read in one place, by a type caster of pybind11, so that the ops themselves are what Python calls.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace fogzo::cuda {
namespace {

int64_t in_range(int64_t value, int64_t limit, const char *argument) {
  if (value < 0 || value >= limit)
    throw std::invalid_argument(std::string(argument) + " must be in 0.." + std::to_string(limit - 1) +
                                ", got " + std::to_string(value));
  return value;
}

constexpr int64_t kMaxBlocks = int64_t(1) << 31;

Dtype any_dtype(const std::string &name, const char *argument) {
  return Dtype(value_of<fogzo::Dtype>(name, argument));
}

Dtype float_dtype(const std::string &name, const char *argument) {
  const Dtype dtype = any_dtype(name, argument);
  if (dtype == Dtype::int8)
    throw std::invalid_argument(std::string(argument) + " must be float32, bfloat16 or float16, got int8");
  return dtype;
}

// ---- readers: what Python gives -> what an op takes

template <class T, class... Members> T read_members(const std::tuple<Members...> &given) {
  return std::apply([](const auto &...members) { return T{members...}; }, given);
}

template <class T> Address<T> read_address(const uintptr_t &given) { return {reinterpret_cast<T *>(given)}; }

Plan read_plan(const std::tuple<Address<const int64_t>, Address<const int32_t>, int64_t, bool, bool> &given) {
  Plan plan = read_members<Plan>(given);
  in_range(plan.blocks, kMaxBlocks, "plan's blocks");
  return plan;
}

CellPlan read_cell_plan(const std::tuple<Address<const int64_t>, Address<const int32_t>, Address<const int32_t>,
                                         int64_t, int64_t, std::string> &given) {
  const auto &[table, owner, second_owner, blocks, second_blocks, data] = given;
  return {table,
          owner,
          second_owner,
          in_range(blocks, kMaxBlocks, "plan's blocks"),
          in_range(second_blocks, kMaxBlocks, "plan's second blocks"),
          float_dtype(data, "data's dtype")};
}

Dtypes read_dtypes(const std::tuple<std::string, std::string, std::string> &given) {
  const auto &[latent, grad, out] = given;
  return {float_dtype(latent, "latent's dtype"), float_dtype(grad, "gradient's dtype"),
          any_dtype(out, "output's dtype")};
}

Draw read_draw(const std::tuple<Distribution, double, Scalar<int64_t>, Scalar<int64_t>, int64_t> &given) {
  const auto &[distribution, C, seed, step, direction] = given;
  return {distribution, C, seed, step, uint32_t(in_range(direction, kMaxDirection, "direction"))};
}

Losses read_losses(
    const std::tuple<Address<const float>, Address<const float>, int64_t, Address<int64_t>, bool> &given) {
  Losses losses = read_members<Losses>(given);
  in_range(losses.n, kMaxDirection + 1, "number of losses");
  return losses;
}

AlphaSums read_sums(const std::tuple<Address<double>, Address<const int32_t>, int64_t> &given) {
  AlphaSums sums = read_members<AlphaSums>(given);
  in_range(sums.count, kMaxBlocks, "number of crossing alphas");
  return sums;
}

Transform read_transform(const int64_t &block) { return {block ? block_of(block) : 0}; }

Distribution read_distribution(const std::string &name) { return value_of<Distribution>(name, "distribution"); }
StraightThrough read_kind(const std::string &name) {
  return value_of<StraightThrough>(name, "straight_through");
}
Statistic read_statistic(const std::string &name) { return value_of<Statistic>(name, "statistic"); }
Rule read_rule(const std::string &name) { return value_of<Rule>(name, "rule"); }

} // namespace
} // namespace fogzo::cuda

namespace pybind11::detail {
using namespace fogzo;
using namespace fogzo::cuda;

template <auto Read> struct ReadBy;
template <class T, class Given, T (*Read)(const Given &)> struct ReadBy<Read> {
  PYBIND11_TYPE_CASTER(T, make_caster<Given>::name);
  bool load(handle source, bool convert) {
    make_caster<Given> given;
    if (!given.load(source, convert))
      return false;
    value = Read(cast_op<const Given &>(given));
    return true;
  }
};

template <class T, class... Members> struct ByMembers : ReadBy<read_members<T, Members...>> {};

template <class T> struct type_caster<Address<T>> : ReadBy<read_address<T>> {};
template <class T> struct type_caster<Scalar<T>> : ByMembers<Scalar<T>, Address<const T>, T> {};
template <> struct type_caster<Where> : ByMembers<Where, int, uintptr_t> {};
template <> struct type_caster<Plan> : ReadBy<read_plan> {};
template <> struct type_caster<CellPlan> : ReadBy<read_cell_plan> {};
template <> struct type_caster<Dtypes> : ReadBy<read_dtypes> {};
template <> struct type_caster<Call> : ByMembers<Call, Where, Plan, Dtypes> {};
template <> struct type_caster<Distribution> : ReadBy<read_distribution> {};
template <> struct type_caster<StraightThrough> : ReadBy<read_kind> {};
template <> struct type_caster<Statistic> : ReadBy<read_statistic> {};
template <> struct type_caster<Rule> : ReadBy<read_rule> {};
template <> struct type_caster<Draw> : ReadBy<read_draw> {};
template <>
struct type_caster<Mix> : ByMembers<Mix, Address<const float>, Scalar<double>, float, Address<const float>> {};
template <> struct type_caster<Losses> : ReadBy<read_losses> {};
template <> struct type_caster<Grid> : ByMembers<Grid, float, float, float, float> {};
template <> struct type_caster<Transform> : ReadBy<read_transform> {};
template <> struct type_caster<Measure> : ByMembers<Measure, Statistic, float, float, float> {};
template <> struct type_caster<AlphaSums> : ReadBy<read_sums> {};
template <> struct type_caster<Hyperparameters> : ReadBy<hyperparameters_of<std::map<std::string, double>>> {};
template <>
struct type_caster<Optimizer>
    : ByMembers<Optimizer, Rule, Hyperparameters, Scalar<double>, Scalar<int64_t>, bool> {};

} // namespace pybind11::detail

namespace fogzo::cuda {
namespace {

#define FOGZO_TEXT2(...) #__VA_ARGS__
#define FOGZO_TEXT(...) FOGZO_TEXT2(__VA_ARGS__)

// Gives the names of enumerators, from the one list of them as text.
std::vector<std::string> column_names(const char *list) {
  std::istringstream text(list);
  std::vector<std::string> names;
  for (std::string name; std::getline(text >> std::ws, name, ',');)
    names.push_back(name);
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"nvcc", FOGZO_NVCC}, {"architectures", FOGZO_CUDA_ARCHITECTURES}};
}

void define_ops(py::module_ &m) {
  m.def("noise", &noise);
  m.def("guide_sumsq", &guide_sumsq);
  m.def("quantize", &quantize);
  m.def("straight_through_backward", &straight_through_backward);
  m.def("learned_backward", &learned_backward);
  m.def("measure_alphas", &measure_alphas);
  m.def("hadamard", [](const Call &call, int64_t block) {
    float_dtype(name_of(fogzo::Dtype(call.dtypes.out)), "output's dtype");
    hadamard(call, block_of(block));
  });
  m.def("perturb_quantize", [](const Call &call, const Draw &draw, const Mix &mix, const Grid &grid,
                               Transform transform, bool plus, bool minus) {
    with_value(draw.distribution,
               [&](auto D) { perturb_quantize<D()>(call, draw, mix, grid, transform, plus, minus); });
  });
  m.def("estimate_gradient", [](const Call &call, const Draw &draw, const Mix &mix, const Losses &losses,
                                float r, Transform transform, Address<float> coefficients) {
    with_value(draw.distribution,
               [&](auto D) { estimate_gradient<D()>(call, draw, mix, losses, r, transform, coefficients); });
  });
  m.def("estimate_update",
        [](const Call &call, const Draw &draw, const Mix &mix, const Losses &losses, const Grid &grid,
           Transform transform, const Optimizer &optimizer, Address<float> coefficients, bool quantized) {
          with_value(draw.distribution, [&](auto D) {
            estimate_update<D()>(call, draw, mix, losses, grid, transform, optimizer, coefficients, quantized);
          });
        });
}

} // namespace
} // namespace fogzo::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace fogzo::cuda;
  m.doc() =
      "CUDA kernels of fogzo_kernels: ops on the addresses of a plan (fogzo_kernels/backends/gpu/plans.py).";
  m.def("build_info", &build_info, "The compiler and the architectures that the kernels were built for.");
  m.attr("COLUMNS") = column_names(FOGZO_TEXT(FOGZO_COLUMNS));
  m.attr("CELL_COLUMNS") = column_names(FOGZO_TEXT(FOGZO_CELL_COLUMNS));
  m.attr("THREADS") = kThreads;
  m.attr("SPAN") = kSpan;
  m.attr("COEFFICIENTS") = int(kCoefficients);
  define_ops(m);
}
