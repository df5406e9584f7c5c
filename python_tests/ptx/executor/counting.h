// How often an instruction was executed, and how much memory it asked for.
#pragma once

#include "warps.h"

namespace ptx {

class Counter {
public:
  // `address`: those of the threads, of an access.
  void count(const Instruction &x, const Lanes &lanes, const Cell *address, Count &c) {
    const bool global =
        (x.kind == Kind::load || x.kind == Kind::store || x.kind == Kind::add) && x.space == Space::generic;
    if (lanes.full && !global) {
      c.lanes += lanes.last - lanes.first;
      c.warps += (lanes.last - lanes.first + kWarp - 1) / kWarp;
      return;
    }
    const int bytes = x.width * x.count;
    for (int w = lanes.first / kWarp; w * kWarp < lanes.last; ++w) {
      int active = 0;
      sectors_.clear();
      for (int l = w * kWarp; l < std::min((w + 1) * kWarp, lanes.last); ++l) {
        if (!lanes.mask[l])
          continue;
        ++active;
        if (global)
          note_sectors(address[l] + x.immediate, bytes);
      }
      c.lanes += active;
      c.warps += active > 0;
      if (global && active) {
        ++c.requests;
        c.sectors += sectors_.size();
        c.bytes += uint64_t(active) * bytes;
      }
    }
  }

private:
  // Of 32 bytes; those of neighbours are found at the end.
  void note_sectors(uint64_t address, int bytes) {
    for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector)
      if (std::find(sectors_.rbegin(), sectors_.rend(), sector) == sectors_.rend())
        sectors_.push_back(sector);
  }

  std::vector<uint64_t> sectors_;
};

} // namespace ptx
