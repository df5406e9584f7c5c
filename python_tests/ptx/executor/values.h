// Numbers as PTX defines them. A register is a cell of 64 bits for each lane; a narrower value lies in its low
// bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

using Cell = uint64_t;

template <class T> inline T get(Cell cell) {
  T value;
  std::memcpy(&value, &cell, sizeof value);
  return value;
}

template <class T> inline Cell put(T value) {
  Cell cell = 0;
  std::memcpy(&cell, &value, sizeof value);
  return cell;
}

// An operation on floats that makes a NaN makes this one (PTX ISA, "Floating Point Instructions").
inline float canonical(float x) { return x != x ? std::bit_cast<float>(0x7FFFFFFFu) : x; }
inline double canonical(double x) { return x != x ? std::bit_cast<double>(0x7FFFFFFFFFFFFFFFull) : x; }

// .ftz: a denormal becomes a zero of its sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// ---- 16-bit floats, in the bits of an integer

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_bfloat16(uint16_t x) { return canonical(std::bit_cast<float>(uint32_t(x) << 16)); }
inline uint16_t to_float16(float x) {
  return x != x ? 0x7FFF : std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
inline float from_float16(uint16_t x) { return canonical(float(std::bit_cast<_Float16>(x))); }

// ---- minimum and maximum: a NaN gives way to a number, and -0 lies below +0

template <class T> T minimum(T a, T b) {
  if (a != a || b != b)
    return canonical(a != a ? b : a);
  return a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
}
template <class T> T maximum(T a, T b) {
  if (a != a || b != b)
    return canonical(a != a ? b : a);
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}
// .NaN: it does not give way
template <class T> T minimum_nan(T a, T b) { return a != a || b != b ? canonical(a + b) : minimum(a, b); }
template <class T> T maximum_nan(T a, T b) { return a != a || b != b ? canonical(a + b) : maximum(a, b); }

// A float that is whole, as an integer. Beyond the type's range it saturates. A NaN gives the sign bit alone
// where the float or the integer has 64 bits, else 0.
template <class Int, class Float> Int saturated(Float x) {
  if (x != x)
    return sizeof(Int) == 8 || sizeof(Float) == 8 ? Int(Int(1) << (8 * sizeof(Int) - 1)) : Int(0);
  const Float limit = std::ldexp(Float(1), int(8 * sizeof(Int)) - std::is_signed_v<Int>);
  if (x >= limit)
    return std::numeric_limits<Int>::max();
  if (x <= (std::is_signed_v<Int> ? -limit : Float(0)))
    return std::numeric_limits<Int>::min();
  return Int(x);
}

// fma rounded towards minus infinity. The error of the product and that of the sum are exact in double.
inline float fma_down(float a, float b, float c) {
  const float nearest = std::fma(a, b, c);
  if (!std::isfinite(nearest)) {
    const bool overflow = nearest > 0 && std::isfinite(a) && std::isfinite(b) && std::isfinite(c);
    return overflow ? std::numeric_limits<float>::max() : canonical(nearest);
  }
  const double product = double(a) * double(b); // exact: 48 bits
  const double sum = product + double(c), high = sum - product;
  const double error = (product - (sum - high)) + (double(c) - high); // two-sum
  const double above = double(nearest) - sum;                         // exact: neighbours
  return above > error ? std::nextafterf(nearest, -INFINITY) : nearest;
}

// ---- results of approximate instructions

// 0: correctly rounded. 1, -1: moved by the bound that PTX documents, up or down. 2: by a share of it that
// depends on the result alone, as the hardware's error does.
inline int approximation = 0;

inline double share(double result) {
  if (approximation != 2)
    return approximation;
  uint64_t h = std::bit_cast<uint64_t>(result) ^ 0x9E3779B97F4A7C15ull;
  h = (h ^ h >> 33) * 0xFF51AFD7ED558CCDull;
  h = (h ^ h >> 33) * 0xC4CEB9FE1A85EC53ull;
  return double(int64_t(h ^ h >> 33)) * 0x1p-63;
}
inline float within_relative(double y, double bound) {
  return canonical(flushed(float(y * (1 + share(y) * bound))));
}
inline float within_absolute(double y, double bound) { return canonical(flushed(float(y + share(y) * bound))); }
inline float within_ulps(double y, int ulps) {
  float found = float(y);
  if (std::isfinite(found) && found != 0) {
    const float away = share(y) < 0 ? -INFINITY : INFINITY,
                ulp = std::nextafterf(std::fabs(found), INFINITY) - std::fabs(found);
    for (int i = int(std::lround(std::fabs(share(y)) * ulps)); i > 0; --i)
      if (const float next = std::nextafterf(found, away); std::fabs(double(next) - y) <= double(ulp) * ulps)
        found = next;
  }
  return canonical(flushed(found));
}
// Of doubles: the upper half of the bits alone.
inline double upper_half(double y) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(y) & 0xFFFFFFFF00000000ull);
}

} // namespace ptx
