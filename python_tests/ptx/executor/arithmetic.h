// What an arithmetic instruction does to the lanes that execute it.
#pragma once

#include "values.h"

#include <map>
#include <string>

namespace ptx {

// The lanes from `first` up to `last` whose mask is set; `full`: all of them.
struct Lanes {
  int first, last;
  const uint8_t *mask;
  bool full;
};

template <class F> inline void for_each(const Lanes &lanes, F f) {
  if (lanes.full) {
    for (int l = lanes.first; l < lanes.last; ++l)
      f(l);
  } else {
    for (int l = lanes.first; l < lanes.last; ++l)
      if (lanes.mask[l])
        f(l);
  }
}

// Cells of results and operands, by lane.
using Arithmetic = void (*)(Cell *const *results, Cell *const *operands, const Lanes &lanes);

struct Opcode {
  Arithmetic run = nullptr;
  int operands = 0;
};

// Every arithmetic opcode, by its name with all modifiers.
const std::map<std::string, Opcode> &opcodes();

} // namespace ptx
