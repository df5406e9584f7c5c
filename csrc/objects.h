// Loops over Python's objects that each step of a training loop makes: whether they hold what they held, and a
// value for each of many dicts.
#pragma once

#include <pybind11/pybind11.h>

namespace fogzo {

namespace py = pybind11;

// Whether dicts, attributes and types are as these tuples say, one fact after the other:
//   entries (dict, key, value): what dict.get(key) is; `absent` where there is no such key, `any` for any value
//   sizes (dict, number): how many keys it has
//   attributes (object, name, value): what the attribute is
//   types (object, type)
inline bool unchanged(const py::tuple &entries, const py::tuple &sizes, const py::tuple &attributes,
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
inline void put(const py::tuple &dicts, py::handle key, py::handle values) {
  const bool each = PyTuple_CheckExact(values.ptr());
  const Py_ssize_t count = PyTuple_GET_SIZE(dicts.ptr());
  if (each && PyTuple_GET_SIZE(values.ptr()) != count)
    throw py::value_error("values must be one for each dict");
  for (Py_ssize_t i = 0; i < count; ++i)
    if (PyDict_SetItem(PyTuple_GET_ITEM(dicts.ptr(), i), key.ptr(),
                       each ? PyTuple_GET_ITEM(values.ptr(), i) : values.ptr()))
      throw py::error_already_set();
}

} // namespace fogzo
