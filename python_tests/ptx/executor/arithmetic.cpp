#include "arithmetic.h"

#include <utility>

namespace ptx {
namespace {

std::map<std::string, Opcode> table;
using Name = const std::string &;

// define<R, A, B>(name, f): the result R f(A, B), lane by lane.
template <class R, class... A, class F> void define(Name name, F) {
  constexpr auto run = []<size_t... I>(std::index_sequence<I...>) -> Arithmetic {
    return [](Cell *const *results, Cell *const *operands, const Lanes &lanes) {
      for_each(lanes, [&](int l) { results[0][l] = put<R>(F{}(get<A>(operands[I][l])...)); });
    };
  };
  table[name] = {run(std::index_sequence_for<A...>{}), sizeof...(A)};
}

template <class T> void integers(Name t) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t bits = 8 * sizeof(T);
  define<T, T, T>("add." + t, [](T a, T b) { return T(U(a) + U(b)); });
  define<T, T, T>("sub." + t, [](T a, T b) { return T(U(a) - U(b)); });
  define<T, T, T>("mul.lo." + t, [](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
  define<T, T, T, T>("mad.lo." + t, [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
  define<T, T, T>("mul.hi." + t, [](T a, T b) {
    if constexpr (std::is_signed_v<T>)
      return T(__int128(a) * __int128(b) >> bits);
    else
      return T(static_cast<unsigned __int128>(a) * static_cast<unsigned __int128>(b) >> bits);
  });
  // Division by zero is undefined in PTX: all bits set, as GPUs have it.
  define<T, T, T>("div." + t, [](T a, T b) {
    return b == 0 ? T(~T(0)) : std::is_signed_v<T> && b == T(-1) ? T(U(0) - U(a)) : T(a / b);
  });
  define<T, T, T>("rem." + t, [](T a, T b) {
    return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  });
  define<T, T, T>("min." + t, [](T a, T b) { return std::min(a, b); });
  define<T, T, T>("max." + t, [](T a, T b) { return std::max(a, b); });
  define<T, T, uint32_t>("shr." + t, [](T a, uint32_t b) { return b >= bits ? T(a < 0 ? -1 : 0) : T(a >> b); });
  define<uint8_t, T, T>("setp.eq." + t, [](T a, T b) { return uint8_t(a == b); });
  define<uint8_t, T, T>("setp.ne." + t, [](T a, T b) { return uint8_t(a != b); });
  define<uint8_t, T, T>("setp.lt." + t, [](T a, T b) { return uint8_t(a < b); });
  define<uint8_t, T, T>("setp.le." + t, [](T a, T b) { return uint8_t(a <= b); });
  define<uint8_t, T, T>("setp.gt." + t, [](T a, T b) { return uint8_t(a > b); });
  define<uint8_t, T, T>("setp.ge." + t, [](T a, T b) { return uint8_t(a >= b); });
  define<T, T, T, uint8_t>("selp." + t, [](T a, T b, uint8_t p) { return p ? a : b; });
  define<T, T>("mov." + t, [](T a) { return a; });
  if constexpr (std::is_signed_v<T>) {
    define<T, T>("neg." + t, [](T a) { return T(U(0) - U(a)); });
    define<T, T>("abs." + t, [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  }
  if constexpr (sizeof(T) < 8) {
    using Signed = std::conditional_t<sizeof(T) == 4, int64_t, int32_t>;
    using D = std::conditional_t<std::is_signed_v<T>, Signed, std::make_unsigned_t<Signed>>;
    define<D, T, T>("mul.wide." + t, [](T a, T b) { return D(D(a) * D(b)); });
    define<D, T, T, D>("mad.wide." + t, [](T a, T b, D c) { return D(uint64_t(D(a) * D(b)) + uint64_t(c)); });
  }
}

template <class U> void bits(Name t) {
  constexpr uint32_t width = 8 * sizeof(U);
  define<U, U, U>("and." + t, [](U a, U b) { return U(a & b); });
  define<U, U, U>("or." + t, [](U a, U b) { return U(a | b); });
  define<U, U, U>("xor." + t, [](U a, U b) { return U(a ^ b); });
  define<U, U>("not." + t, [](U a) { return U(~a); });
  define<U, U, uint32_t>("shl." + t, [](U a, uint32_t b) { return b >= width ? U(0) : U(a << b); });
  define<U, U, uint32_t>("shr." + t, [](U a, uint32_t b) { return b >= width ? U(0) : U(a >> b); });
  define<U, U>("mov." + t, [](U a) { return a; });
  define<U, U, U, uint8_t>("selp." + t, [](U a, U b, uint8_t p) { return p ? a : b; });
  define<uint8_t, U, U>("setp.eq." + t, [](U a, U b) { return uint8_t(a == b); });
  define<uint8_t, U, U>("setp.ne." + t, [](U a, U b) { return uint8_t(a != b); });
}

void predicates() {
  define<uint8_t, uint8_t, uint8_t>("and.pred", [](uint8_t a, uint8_t b) { return uint8_t(a & b); });
  define<uint8_t, uint8_t, uint8_t>("or.pred", [](uint8_t a, uint8_t b) { return uint8_t(a | b); });
  define<uint8_t, uint8_t, uint8_t>("xor.pred", [](uint8_t a, uint8_t b) { return uint8_t(a ^ b); });
  define<uint8_t, uint8_t>("not.pred", [](uint8_t a) { return uint8_t(!a); });
  define<uint8_t, uint8_t>("mov.pred", [](uint8_t a) { return a; });
}

template <class T> void floats(Name t) {
  for (Name r : {std::string(), std::string(".rn")}) { // without .rn ptxas may fuse: see fusing.py
    define<T, T, T>("add" + r + t, [](T a, T b) { return canonical(a + b); });
    define<T, T, T>("sub" + r + t, [](T a, T b) { return canonical(a - b); });
    define<T, T, T>("mul" + r + t, [](T a, T b) { return canonical(a * b); });
  }
  define<T, T, T>("div.rn" + t, [](T a, T b) { return canonical(a / b); });
  define<T, T, T, T>("fma.rn" + t, [](T a, T b, T c) { return canonical(std::fma(a, b, c)); });
  define<T, T>("sqrt.rn" + t, [](T a) { return canonical(std::sqrt(a)); });
  define<T, T>("rcp.rn" + t, [](T a) { return canonical(T(1) / a); });
  define<T, T>("neg" + t, [](T a) { return -a; });
  define<T, T>("abs" + t, [](T a) { return std::fabs(a); });
  define<T, T, T>("min" + t, [](T a, T b) { return minimum(a, b); });
  define<T, T, T>("max" + t, [](T a, T b) { return maximum(a, b); });
  define<T, T>("mov" + t, [](T a) { return a; });
  define<T, T, T, uint8_t>("selp" + t, [](T a, T b, uint8_t p) { return p ? a : b; });
  define<T, T, T>("copysign" + t, [](T a, T b) { return std::copysign(b, a); });
  // Ordered comparisons are false for NaN, the others (..u) true.
  define<uint8_t, T, T>("setp.eq" + t, [](T a, T b) { return uint8_t(a == b); });
  define<uint8_t, T, T>("setp.ne" + t, [](T a, T b) { return uint8_t(a < b || a > b); });
  define<uint8_t, T, T>("setp.lt" + t, [](T a, T b) { return uint8_t(a < b); });
  define<uint8_t, T, T>("setp.le" + t, [](T a, T b) { return uint8_t(a <= b); });
  define<uint8_t, T, T>("setp.gt" + t, [](T a, T b) { return uint8_t(a > b); });
  define<uint8_t, T, T>("setp.ge" + t, [](T a, T b) { return uint8_t(a >= b); });
  define<uint8_t, T, T>("setp.equ" + t, [](T a, T b) { return uint8_t(!(a < b || a > b)); });
  define<uint8_t, T, T>("setp.neu" + t, [](T a, T b) { return uint8_t(a != b); });
  define<uint8_t, T, T>("setp.ltu" + t, [](T a, T b) { return uint8_t(!(a >= b)); });
  define<uint8_t, T, T>("setp.leu" + t, [](T a, T b) { return uint8_t(!(a > b)); });
  define<uint8_t, T, T>("setp.gtu" + t, [](T a, T b) { return uint8_t(!(a <= b)); });
  define<uint8_t, T, T>("setp.geu" + t, [](T a, T b) { return uint8_t(!(a < b)); });
  define<uint8_t, T, T>("setp.nan" + t, [](T a, T b) { return uint8_t(a != a || b != b); });
  define<uint8_t, T, T>("setp.num" + t, [](T a, T b) { return uint8_t(a == a && b == b); });
}

void floats_of_32_bits() {
  define<float, float, float>("min.NaN.f32", [](float a, float b) { return minimum_nan(a, b); });
  define<float, float, float>("max.NaN.f32", [](float a, float b) { return maximum_nan(a, b); });
  define<float, float, float, float>("fma.rm.f32", [](float a, float b, float c) { return fma_down(a, b, c); });
  define<float, float, float>("add.ftz.f32",
                              [](float a, float b) { return canonical(flushed(flushed(a) + flushed(b))); });
  define<float, float, float>("sub.ftz.f32",
                              [](float a, float b) { return canonical(flushed(flushed(a) - flushed(b))); });
  define<float, float, float>("mul.ftz.f32",
                              [](float a, float b) { return canonical(flushed(flushed(a) * flushed(b))); });
  define<float, float, float, float>("fma.rn.ftz.f32", [](float a, float b, float c) {
    return canonical(flushed(std::fma(flushed(a), flushed(b), flushed(c))));
  });
  define<float, float>("abs.ftz.f32", [](float a) { return flushed(std::fabs(a)); });
  define<float, float>("neg.ftz.f32", [](float a) { return flushed(-a); });
}

// Of sm_100: operands of 16 bits, which float holds exactly; the last one and the result have 32.
template <float (*Widen)(uint16_t)> void mixed_floats(Name t) {
  for (Name r : {std::string(), std::string(".rn")}) {
    define<float, uint16_t, float>("add" + r + ".f32." + t,
                                   [](uint16_t a, float b) { return canonical(Widen(a) + b); });
    define<float, uint16_t, float>("sub" + r + ".f32." + t,
                                   [](uint16_t a, float b) { return canonical(Widen(a) - b); });
  }
  define<float, uint16_t, uint16_t, float>("fma.rn.f32." + t, [](uint16_t a, uint16_t b, float c) {
    return canonical(std::fma(Widen(a), Widen(b), c));
  });
}

// Two floats in one register; the first lies in the lower half.
template <class F> Cell both(F f) { return put(f(0)) | put(f(32)) << 32; }

void pairs_of_floats() {
  for (Name r : {std::string(), std::string(".rn")}) {
    define<Cell, Cell, Cell>("add" + r + ".f32x2", [](Cell a, Cell b) {
      return both([=](int at) { return canonical(get<float>(a >> at) + get<float>(b >> at)); });
    });
    define<Cell, Cell, Cell>("sub" + r + ".f32x2", [](Cell a, Cell b) {
      return both([=](int at) { return canonical(get<float>(a >> at) - get<float>(b >> at)); });
    });
    define<Cell, Cell, Cell>("mul" + r + ".f32x2", [](Cell a, Cell b) {
      return both([=](int at) { return canonical(get<float>(a >> at) * get<float>(b >> at)); });
    });
  }
  define<Cell, Cell, Cell, Cell>("fma.rn.f32x2", [](Cell a, Cell b, Cell c) {
    return both([=](int at) {
      return canonical(std::fma(get<float>(a >> at), get<float>(b >> at), get<float>(c >> at)));
    });
  });
}

// Bounds: PTX ISA, "Floating Point Instructions".
void approximations() {
  for (Name f : {std::string(), std::string(".ftz")}) {
    define<float, float>("rcp.approx" + f + ".f32", [](float a) { return within_ulps(1.0 / flushed(a), 1); });
    define<float, float>("sqrt.approx" + f + ".f32",
                         [](float a) { return within_relative(std::sqrt(double(flushed(a))), 0x1p-23); });
    define<float, float>("rsqrt.approx" + f + ".f32",
                         [](float a) { return within_relative(1 / std::sqrt(double(flushed(a))), 0x1p-22); });
    define<float, float>("lg2.approx" + f + ".f32", [](float a) {
      const double y = std::log2(double(flushed(a)));
      return a > 0.5f && a < 2.0f ? within_absolute(y, 0x1p-22) : within_relative(y, 0x1p-22);
    });
    define<float, float>("ex2.approx" + f + ".f32",
                         [](float a) { return within_relative(std::exp2(double(flushed(a))), 0x1p-22); });
    define<float, float>("sin.approx" + f + ".f32", [](float a) {
      return within_absolute(std::sin(double(flushed(a))), 0x1.6A09E6p-21); // 2^-20.5
    });
    define<float, float>("cos.approx" + f + ".f32",
                         [](float a) { return within_absolute(std::cos(double(flushed(a))), 0x1.6A09E6p-21); });
    define<float, float, float>("div.full" + f + ".f32",
                                [](float a, float b) { return within_ulps(double(a) / double(b), 2); });
  }
  define<double, double>("rcp.approx.ftz.f64", [](double a) { return upper_half(1 / a); });
  define<double, double>("rsqrt.approx.ftz.f64", [](double a) { return upper_half(1 / std::sqrt(a)); });
}

// A signed result is extended to the width of its register, which may be wider.
template <class D, class S> void convert(Name d, Name s) {
  using Extended = std::conditional_t<std::is_signed_v<D>, int64_t, D>;
  define<Extended, S>("cvt." + d + "." + s, [](S a) { return Extended(D(a)); });
}

template <class S> void conversions_of_integer(Name s) {
  convert<uint8_t, S>("u8", s);
  convert<int8_t, S>("s8", s);
  convert<uint16_t, S>("u16", s);
  convert<int16_t, S>("s16", s);
  convert<uint32_t, S>("u32", s);
  convert<int32_t, S>("s32", s);
  convert<uint64_t, S>("u64", s);
  convert<int64_t, S>("s64", s);
  define<float, S>("cvt.rn.f32." + s, [](S a) { return float(a); });
  define<double, S>("cvt.rn.f64." + s, [](S a) { return double(a); });
  define<S, float>("cvt.rzi." + s + ".f32", [](float a) { return saturated<S>(std::trunc(a)); });
  define<S, float>("cvt.rni." + s + ".f32", [](float a) { return saturated<S>(std::nearbyint(a)); });
  define<S, double>("cvt.rzi." + s + ".f64", [](double a) { return saturated<S>(std::trunc(a)); });
  define<S, double>("cvt.rni." + s + ".f64", [](double a) { return saturated<S>(std::nearbyint(a)); });
}

void conversions() {
  conversions_of_integer<uint8_t>("u8");
  conversions_of_integer<int8_t>("s8");
  conversions_of_integer<uint16_t>("u16");
  conversions_of_integer<int16_t>("s16");
  conversions_of_integer<uint32_t>("u32");
  conversions_of_integer<int32_t>("s32");
  conversions_of_integer<uint64_t>("u64");
  conversions_of_integer<int64_t>("s64");
  define<double, float>("cvt.f64.f32", [](float a) { return canonical(double(a)); });
  define<float, double>("cvt.rn.f32.f64", [](double a) { return canonical(float(a)); });
  define<float, uint16_t>("cvt.f32.bf16", [](uint16_t a) { return from_bfloat16(a); });
  define<float, uint16_t>("cvt.f32.f16", [](uint16_t a) { return from_float16(a); });
  define<double, uint16_t>("cvt.f64.bf16", [](uint16_t a) { return canonical(double(from_bfloat16(a))); });
  define<double, uint16_t>("cvt.f64.f16", [](uint16_t a) { return canonical(double(from_float16(a))); });
  define<uint32_t, uint32_t>("abs.bf16x2", [](uint32_t a) { return a & 0x7FFF7FFF; });
  define<uint32_t, uint32_t>("abs.f16x2", [](uint32_t a) { return a & 0x7FFF7FFF; });
  define<uint16_t, uint16_t>("abs.bf16", [](uint16_t a) { return uint16_t(a & 0x7FFF); });
  define<uint16_t, uint16_t>("abs.f16", [](uint16_t a) { return uint16_t(a & 0x7FFF); });
  define<uint16_t, float>("cvt.rn.bf16.f32", [](float a) { return to_bfloat16(a); });
  define<uint16_t, float>("cvt.rn.f16.f32", [](float a) { return to_float16(a); });
  // The first operand goes into the upper half.
  define<uint32_t, float, float>(
      "cvt.rn.bf16x2.f32", [](float a, float b) { return uint32_t(to_bfloat16(a)) << 16 | to_bfloat16(b); });
  define<uint32_t, float, float>(
      "cvt.rn.f16x2.f32", [](float a, float b) { return uint32_t(to_float16(a)) << 16 | to_float16(b); });
  define<float, float>("cvt.rni.f32.f32", [](float a) { return canonical(std::nearbyint(a)); });
  define<float, float>("cvt.rzi.f32.f32", [](float a) { return canonical(std::trunc(a)); });
  define<double, double>("cvt.rni.f64.f64", [](double a) { return canonical(std::nearbyint(a)); });
  define<double, double>("cvt.rzi.f64.f64", [](double a) { return canonical(std::trunc(a)); });
  define<float, float>("cvt.sat.f32.f32", [](float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; });
}

void words() {
  define<uint32_t, uint32_t, uint32_t, uint32_t>("prmt.b32", [](uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t found = 0;
    for (int i = 0; i < 32; i += 8) {
      const uint32_t selector = selectors >> i / 2 & 15, byte = bytes >> 8 * (selector & 7) & 255;
      found |= (selector & 8 ? (byte & 128 ? 255u : 0u) : byte) << i;
    }
    return found;
  });
  define<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      "lop3.b32", [](uint32_t a, uint32_t b, uint32_t c, uint32_t truth) {
        uint32_t found = 0;
        for (int i = 0; i < 8; ++i)
          if (truth >> i & 1)
            found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return found;
      });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("dp4a.u32.u32", [](uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8)
      c += (a >> i & 255) * (b >> i & 255);
    return c;
  });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("shf.l.wrap.b32", [](uint32_t low, uint32_t high, uint32_t n) {
    return uint32_t((uint64_t(high) << 32 | low) << (n & 31) >> 32);
  });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("shf.r.wrap.b32", [](uint32_t low, uint32_t high, uint32_t n) {
    return uint32_t((uint64_t(high) << 32 | low) >> (n & 31));
  });
  define<uint32_t, uint32_t, uint32_t, uint32_t>("bfe.u32", [](uint32_t a, uint32_t at, uint32_t length) {
    at &= 255, length &= 255;
    const uint32_t rest = at < 32 ? a >> at : 0;
    return length < 32 ? rest & ((1u << length) - 1) : rest;
  });
  // What lies above the word is its sign.
  define<int32_t, int32_t, uint32_t, uint32_t>("bfe.s32", [](int32_t a, uint32_t at, uint32_t length) {
    at &= 255, length = std::min(length & 255, 32u);
    const uint32_t last = std::min(at + length, 32u) - 1;
    uint32_t found = length && a >> last & 1 ? ~0u : 0u;
    for (uint32_t i = 0; i < length && at + i < 32; ++i)
      found = (found & ~(1u << i)) | (uint32_t(a) >> (at + i) & 1) << i;
    return int32_t(found);
  });
  define<uint32_t, uint32_t>("popc.b32", [](uint32_t a) { return uint32_t(std::popcount(a)); });
  define<uint32_t, uint32_t>("clz.b32", [](uint32_t a) { return uint32_t(std::countl_zero(a)); });
  define<uint32_t, uint64_t>("clz.b64", [](uint64_t a) { return uint32_t(std::countl_zero(a)); });
}

void fill() {
  integers<int16_t>("s16");
  integers<uint16_t>("u16");
  integers<int32_t>("s32");
  integers<uint32_t>("u32");
  integers<int64_t>("s64");
  integers<uint64_t>("u64");
  bits<uint16_t>("b16");
  bits<uint32_t>("b32");
  bits<uint64_t>("b64");
  predicates();
  floats<float>(".f32");
  floats<double>(".f64");
  floats_of_32_bits();
  mixed_floats<from_float16>("f16");
  mixed_floats<from_bfloat16>("bf16");
  pairs_of_floats();
  approximations();
  conversions();
  words();
}

} // namespace

const std::map<std::string, Opcode> &opcodes() {
  if (table.empty())
    fill();
  return table;
}

} // namespace ptx
