// Checks that name the argument, what was expected and what came; no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>

namespace fogzo {

// An argument, or one tensor of a list; only a failed check makes a string of it.
struct Name {
  const char *argument;
  int64_t index;
  Name(const char *argument, size_t index) : argument(argument), index(int64_t(index)) {}
  Name(const char *argument) : argument(argument), index(-1) {}
};

inline std::ostream &operator<<(std::ostream &out, const Name &name) {
  out << name.argument;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}

// The error of a call that cannot be served; PyTorch's own macro would put this file's path before it.
using Refusal = std::runtime_error;

template <class... Parts> [[noreturn]] __attribute__((noinline, cold)) void refuse(const Parts &...parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refusal(text.str());
}

#define FOGZO_CHECK(condition, ...)                                                                            \
  do {                                                                                                         \
    if (!(condition))                                                                                          \
      ::fogzo::refuse(__VA_ARGS__);                                                                            \
  } while (0)

inline void check_range(int64_t value, int64_t first, int64_t last, const Name &name) {
  FOGZO_CHECK(first <= value && value <= last, name, " must be in ", first, "..", last, ", got ", value);
}

} // namespace fogzo
