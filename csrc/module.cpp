// Host-side facts about the native module; touches no tensor.
#include "cpu/module_weight.h"

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

// ---- Python's objects, which each step of a training loop looks at

// Whether dicts, attributes and types are as these tuples say, one fact after the other:
//   entries (dict, key, value): what dict.get(key) is; `absent` where there is no such key, `any` for any value
//   sizes (dict, number): how many keys it has
//   attributes (object, name, value): what the attribute is
//   types (object, type)
bool unchanged(const py::tuple &entries, const py::tuple &sizes, const py::tuple &attributes,
               const py::tuple &types, py::handle absent, py::handle any) {
  const auto item = [](const py::tuple &facts, Py_ssize_t i) { return PyTuple_GET_ITEM(facts.ptr(), i); };
  const auto count = [](const py::tuple &facts) { return PyTuple_GET_SIZE(facts.ptr()); };
  for (Py_ssize_t i = 0; i + 1 < count(types); i += 2)
    if (reinterpret_cast<PyObject *>(Py_TYPE(item(types, i))) != item(types, i + 1))
      return false;
  for (Py_ssize_t i = 0; i + 1 < count(sizes); i += 2)
    if (PyDict_Size(item(sizes, i)) != PyLong_AsSsize_t(item(sizes, i + 1))) {
      if (PyErr_Occurred())
        throw py::error_already_set();
      return false;
    }
  for (Py_ssize_t i = 0; i + 2 < count(entries); i += 3) {
    PyObject *const found = PyDict_GetItemWithError(item(entries, i), item(entries, i + 1));
    if (!found && PyErr_Occurred())
      throw py::error_already_set();
    PyObject *const value = item(entries, i + 2);
    if (value == any.ptr() ? !found : found ? found != value : value != absent.ptr())
      return false;
  }
  for (Py_ssize_t i = 0; i + 2 < count(attributes); i += 3) {
    PyObject *const found = PyObject_GetAttr(item(attributes, i), item(attributes, i + 1));
    if (!found)
      throw py::error_already_set();
    Py_DECREF(found); // compared by its address alone
    if (found != item(attributes, i + 2))
      return false;
  }
  return true;
}

// dict[key] = value for each dict: its value of a tuple, or one value for all.
void put(const py::tuple &dicts, py::handle key, py::handle values) {
  const bool each = PyTuple_CheckExact(values.ptr());
  const Py_ssize_t count = PyTuple_GET_SIZE(dicts.ptr());
  if (each && PyTuple_GET_SIZE(values.ptr()) != count)
    throw py::value_error("values must be one for each dict");
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyDict_SetItem(PyTuple_GET_ITEM(dicts.ptr(), i), key.ptr(),
                       each ? PyTuple_GET_ITEM(values.ptr(), i) : values.ptr()))
      throw py::error_already_set();
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
  m.def("unchanged", &unchanged, "Whether dicts, attributes and types hold what they held.");
  m.def("put", &put, "Set a key of many dicts.");
  m.def("names", &names, "Enumerations, the states of each rule, and the noise's constants, as C++ has them.");
  m.def("philox4x32_10", &philox4x32_10, py::arg("counter"), py::arg("key"),
        "The four 32-bit words of one Philox4x32 call with 10 rounds.");
}
