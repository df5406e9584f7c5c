// Host-side facts about the native module; touches no tensor.
#include "cpu/module_weight.h"
#include "objects.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

#define FOGZO_STR2(x) #x
#define FOGZO_STR(x) FOGZO_STR2(x)

std::map<std::string, std::string> build_info() {
  return {
#if defined(__clang__)
      {"compiler", "clang " FOGZO_STR(__clang_major__) "." FOGZO_STR(__clang_minor__)},
#else
      {"compiler", "gcc " FOGZO_STR(__GNUC__) "." FOGZO_STR(__GNUC_MINOR__)},
#endif
      {"c++", FOGZO_STR(__cplusplus)},
      {"target torch ABI", FOGZO_TORCH_TARGET},
#if defined(NDEBUG)
      {"assertions", "off"},
#else
      {"assertions", "on"},
#endif
      {"sanitizers", FOGZO_SANITIZERS},
  };
}

// The sets of kernels that this processor can run, the best one first.
std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const fogzo::cpu::Kernels *kernels : fogzo::cpu::usable_kernels())
    names.push_back(kernels->isa);
  return names;
}

std::array<uint32_t, 4> philox4x32_10(const std::array<uint32_t, 4> &counter,
                                      const std::array<uint32_t, 2> &key) {
  const fogzo::Words w = fogzo::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {w.x[0], w.x[1], w.x[2], w.x[3]};
}

template <class E> std::vector<std::string> names_of() {
  return {std::begin(fogzo::Listed<E>::names), std::end(fogzo::Listed<E>::names)};
}

// Every enumeration and constant of names.h, under the names that Python gives them.
py::dict names() {
  using namespace fogzo;
  py::dict lists, constants, rules;
#define FOGZO_ENTRY(name, of_python, value) constants[#of_python] = value;
  FOGZO_CONSTANTS(FOGZO_ENTRY)
#undef FOGZO_ENTRY
#define FOGZO_ENTRY(name, states) rules[#name] = states;
  FOGZO_RULES(FOGZO_ENTRY)
#undef FOGZO_ENTRY
  lists["distributions"] = names_of<Distribution>();
  lists["straight_throughs"] = names_of<StraightThrough>();
  lists["statistics"] = names_of<Statistic>();
  lists["rules"] = rules;
  lists["hyperparameters"] = names_of<Hyperparameter>();
  lists["dtypes"] = names_of<Dtype>();
  lists["blocks"] = std::vector<int>(std::begin(kBlocks), std::end(kBlocks));
  lists["constants"] = constants;
  return lists;
}

// A held list, released with this object.
class Hold {
public:
  explicit Hold(int64_t number) : number(number) {}
  ~Hold() { fogzo::cpu::HeldLists::all().remove(number); }
  const int64_t number;
};

// Of each held list, 0 for 0: it changes when any of its tensors does.
std::vector<int64_t> generations(const std::vector<int64_t> &numbers) {
  std::vector<int64_t> result;
  for (int64_t number : numbers) {
    const auto list = fogzo::cpu::HeldLists::all().find(number);
    if (!list && number)
      throw std::invalid_argument("numbers must name lists that are held, got " + std::to_string(number));
    result.push_back(list ? list->now()->generation : 0);
  }
  return result;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of fogzo_kernels: importing it registers the fogzo_cpu ops.";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets that have kernels and that this processor can run.");
  m.def("cpu_isa", [] { return fogzo::cpu::kernels().isa; }, "The one in use.");
  py::class_<Hold>(m, "Hold").def(py::init<int64_t>()).def_readonly("number", &Hold::number);
  using fogzo::cpu::ModuleWeight;
  py::class_<ModuleWeight>(m, "ModuleWeight")
      .def(py::init<int64_t, int64_t, int64_t, double, int64_t, int64_t, const std::string &, double, double,
                    bool>())
      .def("quantize", &ModuleWeight::quantize, py::call_guard<py::gil_scoped_release>())
      .def("backward", &ModuleWeight::backward, py::call_guard<py::gil_scoped_release>());
  m.def("generations", &generations, "The state of each held list, by its number.");
  m.def("held_lists", [] { return fogzo::cpu::HeldLists::all().size(); }, "How many there are.");
  m.def("unchanged", &fogzo::unchanged, "Whether dicts, attributes and types hold what they held.");
  m.def("put", &fogzo::put, "Set a key of many dicts.");
  m.def("names", &names, "Enumerations, the states of each rule, and the noise's constants, as C++ has them.");
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
        "The four 32-bit words of one Philox4x32 call with 10 rounds.");
}
