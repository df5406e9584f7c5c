// pybind11: the CUDA ops on addresses, and how they were built. No torch: one build serves every release,
// and imports where there is no CUDA driver.
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

// Arguments as Python gives them; addresses are integers, 0 for none.
using WhereArgument = std::tuple<int, uintptr_t>;                            // device, stream
using PlanArgument = std::tuple<uintptr_t, uintptr_t, int64_t, bool, bool>;  // table .. shard
using LongArgument = std::tuple<uintptr_t, int64_t>;                         // address, or 0 and value
using DoubleArgument = std::tuple<uintptr_t, double>;                        // the same
using StepArgument = std::tuple<LongArgument, LongArgument, DoubleArgument>; // seed, step, 1 - beta
using DrawArgument = std::tuple<std::string, double, StepArgument>;          // distribution, C, step
using LossesArgument = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, double>;
using GridArgument = std::tuple<double, double, double, double>;          // qmin, qmax, offset, r
using DtypesArgument = std::tuple<std::string, std::string, std::string>; // latents, gradients, outputs
// name of the rule, hyperparameters by name, lr, count
using OptimizerArgument = std::tuple<std::string, std::map<std::string, double>, DoubleArgument, LongArgument>;
using SumsArgument = std::tuple<uintptr_t, uintptr_t, int64_t>; // partial, crossing, how many of these
// table, owner, second owner, blocks, second blocks
using CellPlanArgument = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;
using MeasureArgument = std::tuple<std::string, double, double, double>; // statistic, factor, add, least

int64_t in_range(int64_t value, int64_t limit, const char *argument) {
  if (value < 0 || value >= limit)
    throw std::invalid_argument(std::string(argument) + " must be in 0.." + std::to_string(limit - 1) +
                                ", got " + std::to_string(value));
  return value;
}

template <class T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

Where where_of(const WhereArgument &a) { return {std::get<0>(a), std::get<1>(a)}; }

Plan plan_of(const PlanArgument &a) {
  const auto [table, owner, blocks, per_tensor, shard] = a;
  return {pointer<const int64_t>(table), pointer<const int32_t>(owner),
          in_range(blocks, int64_t(1) << 31, "plan's blocks"), per_tensor, shard};
}

CellPlan cell_plan_of(const CellPlanArgument &a) {
  const auto [table, owner, second_owner, blocks, second_blocks] = a;
  constexpr int64_t limit = int64_t(1) << 31;
  return {pointer<const int64_t>(table), pointer<const int32_t>(owner), pointer<const int32_t>(second_owner),
          in_range(blocks, limit, "plan's blocks"), in_range(second_blocks, limit, "plan's second blocks")};
}

AlphaSums sums_of(const SumsArgument &a) {
  const auto [partial, crossing, count] = a;
  return {pointer<double>(partial), pointer<const int32_t>(crossing),
          in_range(count, int64_t(1) << 31, "number of crossing alphas")};
}

template <class T> Scalar<T> scalar_of(const std::tuple<uintptr_t, T> &a) {
  return {pointer<const T>(std::get<0>(a)), std::get<1>(a)};
}

Step step_of(const StepArgument &a) {
  return {scalar_of(std::get<0>(a)), scalar_of(std::get<1>(a)), scalar_of(std::get<2>(a))};
}

Draw draw_of(const DrawArgument &a) {
  const auto &[distribution, C, step] = a;
  return {value_of<Distribution>(distribution, "distribution"), C, step_of(step)};
}

uint32_t direction_of(int64_t direction) { return uint32_t(in_range(direction, kMaxDirection, "direction")); }

Losses losses_of(const LossesArgument &a) {
  const auto [plus, minus, n, norm, counters, epsilon] = a;
  return {pointer<const float>(plus),
          pointer<const float>(minus),
          in_range(n, kMaxDirection + 1, "number of losses"),
          pointer<const float>(norm),
          pointer<int64_t>(counters),
          double(float(epsilon))};
}

Grid grid_of(const GridArgument &a) {
  return {float(std::get<0>(a)), float(std::get<1>(a)), float(std::get<2>(a)), float(std::get<3>(a))};
}

Dtype dtype_of_name(const std::string &name, const char *argument) {
  return Dtype(value_of<fogzo::Dtype>(name, argument));
}

Dtype float_of_name(const std::string &name, const char *argument) {
  const Dtype found = dtype_of_name(name, argument);
  if (found == Dtype::int8)
    throw std::invalid_argument(std::string(argument) + " must be float32, bfloat16 or float16, got int8");
  return found;
}

Dtypes dtypes_of(const DtypesArgument &a) {
  const auto &[latent, grad, out] = a;
  return {float_of_name(latent, "latent's dtype"), float_of_name(grad, "gradient's dtype"),
          dtype_of_name(out, "output's dtype")};
}

Optimizer optimizer_of(const OptimizerArgument &a) {
  const auto &[rule, hyperparameters, lr, count] = a;
  return {value_of<Rule>(rule, "rule"), hyperparameters_of(hyperparameters), scalar_of(lr), scalar_of(count)};
}

// Of a quantizer's transform; 0 for none.
int transform_of(int64_t block) { return block ? block_of(block) : 0; }

Measure measure_of(const MeasureArgument &a) {
  const auto &[statistic, factor, add, least] = a;
  return {value_of<Statistic>(statistic, "statistic"), float(factor), float(add), float(least)};
}

#define FOGZO_TEXT2(...) #__VA_ARGS__
#define FOGZO_TEXT(...) FOGZO_TEXT2(__VA_ARGS__)

// The names of enumerators, from the one list of them as text.
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
  m.def("noise",
        [](const WhereArgument &where, const PlanArgument &plan, const DrawArgument &draw, int64_t direction) {
          noise(where_of(where), plan_of(plan), draw_of(draw), direction_of(direction));
        });
  m.def("guide_sumsq", [](const WhereArgument &where, const PlanArgument &plan, const std::string &grad,
                          double r, uintptr_t partial, uintptr_t out, bool root) {
    guide_sumsq(where_of(where), plan_of(plan), float_of_name(grad, "gradient's dtype"), float(r),
                pointer<double>(partial), pointer<void>(out), root);
  });
  m.def("perturb_quantize",
        [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes, bool plus,
           bool minus, const DrawArgument &draw, int64_t direction, uintptr_t norm, const GridArgument &grid,
           double epsilon, int64_t block) {
          perturb_quantize(where_of(where), plan_of(plan), dtypes_of(dtypes), plus, minus, draw_of(draw),
                           direction_of(direction), pointer<const float>(norm), grid_of(grid), epsilon,
                           transform_of(block));
        });
  m.def("estimate_gradient", [](const WhereArgument &where, const PlanArgument &plan, const std::string &grad,
                                const DrawArgument &draw, const LossesArgument &losses, double r,
                                uintptr_t coefficients, int64_t block) {
    estimate_gradient(where_of(where), plan_of(plan), float_of_name(grad, "gradient's dtype"), draw_of(draw),
                      losses_of(losses), float(r), pointer<float>(coefficients), transform_of(block));
  });
  m.def("estimate_update",
        [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes, bool master,
           bool quantized, const DrawArgument &draw, const LossesArgument &losses, const GridArgument &grid,
           const OptimizerArgument &optimizer, uintptr_t coefficients, int64_t block) {
          estimate_update(where_of(where), plan_of(plan), dtypes_of(dtypes), master, quantized, draw_of(draw),
                          losses_of(losses), grid_of(grid), optimizer_of(optimizer),
                          pointer<float>(coefficients), transform_of(block));
        });
  m.def("quantize", [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes,
                       const GridArgument &grid, int64_t block) {
    quantize(where_of(where), plan_of(plan), dtypes_of(dtypes), grid_of(grid), transform_of(block));
  });
  m.def("straight_through_backward",
        [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes,
           const GridArgument &grid, const std::string &straight_through, int64_t block) {
          straight_through_backward(where_of(where), plan_of(plan), dtypes_of(dtypes), grid_of(grid),
                                    value_of<StraightThrough>(straight_through, "straight_through"),
                                    transform_of(block));
        });
  m.def("measure_alphas", [](const WhereArgument &where, const CellPlanArgument &plan, const std::string &data,
                             const MeasureArgument &measure, uintptr_t partial) {
    measure_alphas(where_of(where), cell_plan_of(plan), float_of_name(data, "data's dtype"),
                   measure_of(measure), pointer<double>(partial));
  });
  m.def("learned_backward",
        [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes,
           const GridArgument &grid, const std::string &straight_through, const SumsArgument &partial,
           int64_t block) {
          const auto kind = value_of<StraightThrough>(straight_through, "straight_through");
          const AlphaSums sums = sums_of(partial);
          if (const int size = transform_of(block))
            rotated_learned_backward(where_of(where), plan_of(plan), dtypes_of(dtypes), grid_of(grid), kind,
                                     sums, size);
          else
            learned_backward(where_of(where), plan_of(plan), dtypes_of(dtypes), grid_of(grid), kind, sums);
        });
  m.def("hadamard",
        [](const WhereArgument &where, const PlanArgument &plan, const DtypesArgument &dtypes, int64_t block) {
          const auto types = dtypes_of(dtypes);
          float_of_name(std::get<2>(dtypes), "output's dtype");
          hadamard(where_of(where), plan_of(plan), types, block_of(block));
        });
}

} // namespace
} // namespace fogzo::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace fogzo::cuda;
  m.doc() = "CUDA kernels of fogzo_kernels: ops on the addresses of a plan (fogzo_kernels/plans.py).";
  m.def("build_info", &build_info, "The compiler and the architectures that the kernels were built for.");
  m.attr("COLUMNS") = column_names(FOGZO_TEXT(FOGZO_COLUMNS));
  m.attr("CELL_COLUMNS") = column_names(FOGZO_TEXT(FOGZO_CELL_COLUMNS));
  m.attr("THREADS") = kThreads;
  m.attr("SPAN") = kSpan;
  m.attr("ESTIMATE_COEFFICIENTS") = kEstimateCoefficients;
  m.attr("UPDATE_COEFFICIENTS") = kUpdateCoefficients;
  define_ops(m);
}
