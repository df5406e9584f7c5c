// Instructions that the threads of a warp execute together: they see each other's registers.
#pragma once

#include "memory.h"

namespace ptx {

constexpr int kWarp = 32;

// PTX ISA, "shfl.sync": the second operand is the distance or lane, the third holds bounds of segments.
inline void shuffle(const Instruction &x, Cell **result, Cell **operand, const Lanes &lanes) {
  const std::vector<Cell> from(operand[0], operand[0] + lanes.last);
  enum { up, down, butterfly, index };
  for_each(lanes, [&](int l) {
    const int lane = l % kWarp, b = operand[1][l] & 31, bounds = int(operand[2][l]);
    const int segment = bounds >> 8 & 31, most = (lane & segment) | (bounds & 31 & ~segment);
    int source = 0;
    bool inside = false;
    switch (x.immediate) {
    case up:
      source = lane - b;
      inside = source >= most;
      break;
    case down:
      source = lane + b;
      inside = source <= most;
      break;
    case butterfly:
      source = lane ^ b;
      inside = source <= most;
      break;
    case index:
      source = (lane & segment) | (b & ~segment);
      inside = source <= most;
      break;
    }
    const int chosen = l - lane + (inside ? source : lane);
    if (!lanes.mask[chosen])
      refuse(x, "it reads from a thread that does not take part");
    result[0][l] = uint32_t(from[chosen]);
    if (x.results > 1 && result[1])
      result[1][l] = inside;
  });
}

inline uint32_t joined(int how, uint32_t a, uint32_t b) {
  enum { add, max_signed, min_signed, max, min, bit_or, bit_and, bit_xor };
  switch (how) {
  case add:
    return a + b;
  case max_signed:
    return uint32_t(std::max(int32_t(a), int32_t(b)));
  case min_signed:
    return uint32_t(std::min(int32_t(a), int32_t(b)));
  case max:
    return std::max(a, b);
  case min:
    return std::min(a, b);
  case bit_or:
    return a | b;
  case bit_and:
    return a & b;
  case bit_xor:
    return a ^ b;
  }
  return 0;
}

inline void reduce(const Instruction &x, Cell **result, Cell **operand, const Lanes &lanes) {
  for (int w = lanes.first / kWarp; w * kWarp < lanes.last; ++w) {
    const int begin = w * kWarp, end = std::min(begin + kWarp, lanes.last);
    uint32_t found = 0, come = 0;
    for (int l = begin; l < end; ++l) {
      if (!lanes.mask[l])
        continue;
      const uint32_t value = uint32_t(operand[0][l]);
      if (x.kind == Kind::vote)
        found |= uint32_t(uint8_t(value) != 0) << (l - begin);
      else
        found = come ? joined(int(x.immediate), found, value) : value;
      come |= 1u << (l - begin);
    }
    enum { ballot, any, all };
    if (x.kind == Kind::vote && x.immediate != ballot)
      found = x.immediate == any ? found != 0 : found == come;
    for (int l = begin; l < end; ++l)
      if (lanes.mask[l])
        result[0][l] = found;
  }
}

// ldmatrix and stmatrix: 8 by 8 halves. Lane 8 k + r has the address of row r of matrix k. Of each matrix a
// lane holds two neighbours, of row lane / 4, or of that column where it is transposed.
// `bytes_of(lane, address)`: the 16 bytes of a row.
template <class F>
void matrices(const Instruction &x, Cell **result, Cell **operand, const Lanes &lanes, F bytes_of) {
  const bool loads = x.kind == Kind::load_matrix, transposed = x.is_signed;
  for (int w = lanes.first / kWarp; w * kWarp < lanes.last; ++w) {
    const int first = w * kWarp;
    if (!lanes.mask[first])
      continue;
    for (int k = 0; k < x.count; ++k)
      for (int row = 0; row < 8; ++row) {
        const int owner = first + 8 * k + row;
        uint8_t *at = bytes_of(owner, operand[0][owner] + x.immediate);
        for (int column = 0; column < 8; ++column, at += 2) {
          const int i = transposed ? column : row, j = transposed ? row : column;
          const int lane = first + 4 * i + j / 2, shift = 16 * (j % 2);
          if (loads) {
            uint16_t half;
            std::memcpy(&half, at, 2);
            Cell &cell = result[k][lane];
            cell = (cell & (0xFFFF0000u >> shift)) | Cell(half) << shift;
          } else {
            const uint16_t half = uint16_t(operand[1 + k][lane] >> shift);
            std::memcpy(at, &half, 2);
          }
        }
      }
  }
}

} // namespace ptx
