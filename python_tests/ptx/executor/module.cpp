// The executor for Python. decode.py makes a Program of PTX text; driver modules launch it.
#include "program.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

namespace py = pybind11;
using namespace ptx;

namespace {

std::vector<std::pair<std::string, int>> names_of_opcodes() {
  std::vector<std::pair<std::string, int>> found;
  for (const auto &[name, opcode] : opcodes())
    found.emplace_back(name, opcode.operands);
  return found;
}

const std::map<std::string, Kind> &kinds() {
  static const std::map<std::string, Kind> all{{"arithmetic", Kind::arithmetic},
                                               {"pack", Kind::pack},
                                               {"unpack", Kind::unpack},
                                               {"branch", Kind::branch},
                                               {"end", Kind::end},
                                               {"barrier", Kind::barrier},
                                               {"load", Kind::load},
                                               {"store", Kind::store},
                                               {"add", Kind::add},
                                               {"shuffle", Kind::shuffle},
                                               {"reduce", Kind::reduce},
                                               {"vote", Kind::vote},
                                               {"ldmatrix", Kind::load_matrix},
                                               {"stmatrix", Kind::store_matrix},
                                               {"warp_barrier", Kind::warp_barrier}};
  return all;
}

const std::map<std::string, Space> &spaces() {
  static const std::map<std::string, Space> all{{"generic", Space::generic},
                                                {"shared", Space::shared},
                                                {"parameter", Space::parameter},
                                                {"local", Space::local}};
  return all;
}

int fill(std::array<int, kMaxOperands> &place, const std::vector<int> &registers, const std::string &opcode) {
  if (registers.size() > kMaxOperands)
    throw std::invalid_argument(opcode + " has too many operands");
  std::copy(registers.begin(), registers.end(), place.begin());
  return int(registers.size());
}

void add(Program &program, const std::string &kind, const std::string &opcode, int line, int predicate,
         bool negated, const std::vector<int> &results, const std::vector<int> &operands, int64_t immediate,
         int target, int width, int count, bool is_signed, const std::string &space) {
  Instruction x{};
  x.kind = kinds().at(kind);
  x.opcode = opcode;
  x.line = line;
  x.predicate = predicate;
  x.negated = negated;
  x.results = fill(x.result, results, opcode);
  x.operands = fill(x.operand, operands, opcode);
  x.immediate = immediate;
  x.target = target;
  x.width = width;
  x.count = count;
  x.is_signed = is_signed;
  x.space = spaces().at(space);
  if (x.kind == Kind::arithmetic) {
    const auto found = opcodes().find(opcode);
    if (found == opcodes().end())
      throw std::invalid_argument("line " + std::to_string(line) + ": no code for the instruction " + opcode);
    if (found->second.operands != x.operands || x.results != 1)
      throw std::invalid_argument("line " + std::to_string(line) + ": " + opcode + " must have 1 result and " +
                                  std::to_string(found->second.operands) + " operands, got " +
                                  std::to_string(x.results) + " and " + std::to_string(x.operands));
    x.run = found->second.run;
  }
  program.add(std::move(x));
}

using Row = std::tuple<std::string, int, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;

std::vector<Row> counts(const Program &program) {
  std::vector<Row> rows;
  for (size_t i = 0; i < program.code.size(); ++i) {
    const Count &c = program.counts[i];
    rows.emplace_back(program.code[i].opcode, program.code[i].line, c.warps, c.lanes, c.requests, c.sectors,
                      c.bytes);
  }
  return rows;
}

void run_launch(Program &program, int64_t blocks, int threads, const std::string &parameters,
                int dynamic_shared, std::vector<std::pair<uint64_t, uint64_t>> memory, uint64_t order) {
  if (int(parameters.size()) != program.parameter_bytes)
    throw std::invalid_argument("the kernel has " + std::to_string(program.parameter_bytes) +
                                " bytes of parameters, got " + std::to_string(parameters.size()));
  py::gil_scoped_release release;
  run(program, {blocks, threads, parameters, dynamic_shared, std::move(memory), order});
}

} // namespace

PYBIND11_MODULE(_executor, m) {
  m.doc() = "Runs decoded PTX on the CPU.";
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def_readwrite("registers", &Program::registers)
      .def_readwrite("shared_bytes", &Program::shared_bytes)
      .def_readwrite("local_bytes", &Program::local_bytes)
      .def_readwrite("parameter_bytes", &Program::parameter_bytes)
      .def_readwrite("constants", &Program::constants)
      .def_readwrite("parameters", &Program::parameters)
      .def_readwrite("locals", &Program::locals)
      .def_readwrite("specials", &Program::specials)
      .def_readwrite("read_only", &Program::read_only)
      .def_readonly("segments", &Program::segments)
      .def_readonly("divergent", &Program::divergent)
      .def("add", &add)
      .def("counts", &counts, "opcode, line, warps, lanes, requests, sectors and bytes of each instruction")
      .def("clear", &Program::clear)
      .def("run", &run_launch);
  m.def("opcodes", &names_of_opcodes, "Every arithmetic opcode and its number of operands.");
  m.def("approximate", [](int how) { approximation = how; }, "See values.h.");
}
