// Every enumeration, and every constant of the noise, once for all of C++. Python has them in
// fogzo_kernels/spec; a test compares the two (_C.names()). Host and device; no torch.
//
// A list is a macro that applies another to each name. From it come the enumeration, its names as text, the
// value of a name (value_of) and the switch that makes of a value a constant of the compiler (with_value).
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

// Of noise.
#define FOGZO_DISTRIBUTIONS(X) X(uniform) X(rademacher) X(triangular) X(logistic) X(gaussian)

// Forms of the straight-through derivative.
#define FOGZO_STRAIGHT_THROUGHS(X)                                                                             \
  X(identity_clipped) X(identity_trust) X(identity) X(hardtanh) X(tanh) X(approxsign)

// What an alpha is made of.
#define FOGZO_STATISTICS(X) X(absmax) X(absmean) X(rms)
// Elements of a block of the Hadamard transform.
#define FOGZO_BLOCKS(X) X(16) X(32) X(64) X(128) X(256) X(512) X(1024)

// Of updates, and how many states each has.
#define FOGZO_RULES(X) X(adamw, 2) X(sgd, 0) X(momentum, 1) X(nesterov, 1)

#define FOGZO_HYPERPARAMETERS(X) X(weight_decay) X(beta1) X(beta2) X(eps) X(momentum) X(dampening)

// Of tensors: floats, and int8 for codes.
#define FOGZO_DTYPES(X) X(float32) X(bfloat16) X(float16) X(int8)

// The noise's constants, with the names that Python gives them; limits are exclusive.
#define FOGZO_CONSTANTS(X)                                                                                     \
  X(kPhiloxM0, PHILOX_M0, 0xD2511F53u)                                                                         \
  X(kPhiloxM1, PHILOX_M1, 0xCD9E8D57u)                                                                         \
  X(kPhiloxW0, PHILOX_W0, 0x9E3779B9u)                                                                         \
  X(kPhiloxW1, PHILOX_W1, 0xBB67AE85u)                                                                         \
  X(kPhiloxRounds, PHILOX_ROUNDS, 10)                                                                          \
  X(kMaxStep, MAX_STEP, int64_t(1) << 32)                                                                      \
  X(kMaxDirection, MAX_DIRECTION, int64_t(1) << 16)                                                            \
  X(kMaxTensorId, MAX_TENSOR_ID, (int64_t(1) << 32) - 1)                                                       \
  X(kMaxElement, MAX_ELEMENT, int64_t(1) << 51)                                                                \
  X(kSignTensorId, SIGN_TENSOR_ID, 0xFFFFFFFFu) // reserved: names the sign of a direction

namespace fogzo {

#define FOGZO_CONSTANT(name, of_python, value) constexpr auto name = value;
FOGZO_CONSTANTS(FOGZO_CONSTANT)
#undef FOGZO_CONSTANT

// The names of an enumeration, in the order of its values.
template <class E> struct Listed;

// What a template that knows each value says of one that it does not: static_assert(unknown<value>).
template <auto> constexpr bool unknown = false;

#define FOGZO_ENUMERATOR(name, ...) name,
#define FOGZO_TEXT_OF(name, ...) #name,
#define FOGZO_CASE(name, ...)                                                                                  \
  case Enumeration::name:                                                                                      \
    return f(std::integral_constant<Enumeration, Enumeration::name>());

// E, Listed<E> and with_value(): f(std::integral_constant<E, value>) for a value known when it runs.
#define FOGZO_ENUMERATION(E, LIST)                                                                             \
  enum class E { LIST(FOGZO_ENUMERATOR) };                                                                     \
  template <> struct Listed<E> {                                                                               \
    static constexpr const char *names[] = {LIST(FOGZO_TEXT_OF)};                                              \
  };                                                                                                           \
  template <class F> decltype(auto) with_value(E value, F f) {                                                 \
    using Enumeration = E;                                                                                     \
    switch (value) { LIST(FOGZO_CASE) }                                                                        \
    throw std::logic_error("an enumeration holds no value of its own");                                        \
  }

FOGZO_ENUMERATION(Distribution, FOGZO_DISTRIBUTIONS)
FOGZO_ENUMERATION(StraightThrough, FOGZO_STRAIGHT_THROUGHS)
FOGZO_ENUMERATION(Statistic, FOGZO_STATISTICS)
FOGZO_ENUMERATION(Rule, FOGZO_RULES)
FOGZO_ENUMERATION(Hyperparameter, FOGZO_HYPERPARAMETERS)
FOGZO_ENUMERATION(Dtype, FOGZO_DTYPES)
#undef FOGZO_ENUMERATION
#undef FOGZO_CASE

template <class E> constexpr int kCount = int(std::extent<decltype(Listed<E>::names)>::value);

template <class E> const char *name_of(E value) { return Listed<E>::names[int(value)]; }

// An error that lists what an argument may be.
template <class List, class Given>
[[noreturn]] void refuse_unknown(const char *argument, const List &known, const Given &given) {
  std::ostringstream text;
  const char *separator = " must be one of ";
  text << argument;
  for (const auto &value : known) {
    text << separator << value;
    separator = ", ";
  }
  text << ", got " << given;
  throw std::invalid_argument(text.str());
}

// The value of that name.
template <class E> E value_of(const std::string &name, const char *argument) {
  for (int i = 0; i < kCount<E>; ++i)
    if (name == Listed<E>::names[i])
      return E(i);
  refuse_unknown(argument, Listed<E>::names, name);
}

#define FOGZO_STATES(name, states) states,
#define FOGZO_SIZE(size) size,
constexpr int kStates[] = {FOGZO_RULES(FOGZO_STATES)};
constexpr int kBlocks[] = {FOGZO_BLOCKS(FOGZO_SIZE)};
#undef FOGZO_STATES
#undef FOGZO_SIZE

constexpr int states_of(Rule rule) { return kStates[int(rule)]; }

// f(std::integral_constant<int, block>) for a block of kBlocks
template <class F> void with_block(int block, F f) {
#define FOGZO_CASE(size)                                                                                       \
  case size:                                                                                                   \
    return f(std::integral_constant<int, size>());
  switch (block) { FOGZO_BLOCKS(FOGZO_CASE) }
#undef FOGZO_CASE
  throw std::logic_error("a block has none of the sizes of its own");
}

// The size of a block.
inline int block_of(int64_t given) {
  for (int block : kBlocks)
    if (block == given)
      return block;
  refuse_unknown("block", kBlocks, given);
}

// One number for each hyperparameter.
struct Hyperparameters {
#define FOGZO_MEMBER(name) double name;
  FOGZO_HYPERPARAMETERS(FOGZO_MEMBER)
#undef FOGZO_MEMBER
};

// From pairs of a name and a number, each name once.
template <class Pairs> Hyperparameters hyperparameters_of(const Pairs &pairs) {
#define FOGZO_MEMBER(name) &Hyperparameters::name,
  constexpr double Hyperparameters::*members[] = {FOGZO_HYPERPARAMETERS(FOGZO_MEMBER)};
#undef FOGZO_MEMBER
  Hyperparameters hyperparameters{};
  bool given[kCount<Hyperparameter>] = {};
  for (const auto &[name, value] : pairs) {
    const int i = int(value_of<Hyperparameter>(name, "hyperparameters"));
    if (given[i])
      throw std::invalid_argument("hyperparameters must name " + std::string(name) + " once, got it twice");
    hyperparameters.*members[i] = value;
    given[i] = true;
  }
  for (int i = 0; i < kCount<Hyperparameter>; ++i)
    if (!given[i])
      throw std::invalid_argument("hyperparameters must name " + std::string(Listed<Hyperparameter>::names[i]) +
                                  ", got none of that name");
  return hyperparameters;
}

} // namespace fogzo
