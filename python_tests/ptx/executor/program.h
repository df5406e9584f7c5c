// A decoded kernel (decode.py), and what its launches counted.
#pragma once

#include "arithmetic.h"

#include <array>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

enum class Kind {
  arithmetic,
  pack,
  unpack,
  branch,
  end,
  barrier,
  warp_barrier,
  load,
  store,
  add,
  shuffle,
  reduce,
  vote,
  load_matrix,
  store_matrix
};
enum class Space { generic, shared, parameter, local };

constexpr int kMaxOperands = 10;

struct Instruction {
  Kind kind;
  std::string opcode;
  int line = 0; // of the PTX
  Arithmetic run = nullptr;
  int predicate = -1; // register, or -1
  bool negated = false;
  int results = 0, operands = 0;
  std::array<int, kMaxOperands> result{}, operand{}; // registers; -1: not wanted
  int64_t immediate = 0;                             // address offset, or which variant of the opcode
  int target = 0;                                    // of a branch
  int width = 0, count = 1;                          // of an access: bytes of a value, values
  bool is_signed = false;
  Space space = Space::generic;
};

// Of an instruction, over all launches since clear().
struct Count {
  uint64_t warps = 0, lanes = 0, requests = 0, sectors = 0, bytes = 0;
};

struct Program {
  std::vector<Instruction> code;
  int registers = 0, shared_bytes = 0, local_bytes = 0, parameter_bytes = 0;
  std::vector<std::pair<int, Cell>> constants;          // registers that hold a value
  std::vector<std::pair<int, int>> parameters, locals;  // registers that hold an address: offset in the space
  std::vector<std::pair<int, std::string>> specials;    // such as %tid.x
  std::vector<std::pair<uint64_t, uint64_t>> read_only; // addresses of constant arrays
  std::vector<uint8_t> targets;                         // by instruction: threads may meet there
  std::vector<Count> counts;
  uint64_t segments = 0, divergent = 0; // runs of instructions without a choice between groups of threads

  void add(Instruction instruction) {
    code.push_back(std::move(instruction));
    counts.emplace_back();
  }
  void clear() {
    std::fill(counts.begin(), counts.end(), Count{});
    segments = divergent = 0;
  }
};

struct Launch {
  int64_t blocks;
  int threads;
  std::string parameters; // bytes
  int dynamic_shared = 0;
  std::vector<std::pair<uint64_t, uint64_t>>
      memory;         // what the kernel may touch, [begin, end), sorted, disjoint
  uint64_t order = 0; // seed of a random order of warps; 0: all in step
};

// Throws std::runtime_error that names the line and what is wrong.
void run(Program &program, const Launch &launch);

} // namespace ptx
