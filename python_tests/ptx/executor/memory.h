// What addresses mean: which bytes a launch may touch, where they lie on the host, and who touched them.
#pragma once

#include "program.h"
#include "shadow.h"

#include <stdexcept>

namespace ptx {

[[noreturn]] inline void refuse(const Instruction &x, const std::string &what) {
  throw std::runtime_error("line " + std::to_string(x.line) + ", " + x.opcode + ": " + what);
}

// All of a launch: tensors, constant arrays, parameters and local memory, which lie where their addresses say,
// and the shared memory of the block at hand, whose addresses count from its start.
class Memory {
public:
  Memory(const Program &program, const Launch &launch, int lanes)
      : parameters_(launch.parameters), local_bytes_(program.local_bytes),
        local_(size_t(local_bytes_) * lanes + 16) {
    const size_t shared = program.shared_bytes + launch.dynamic_shared;
    size_t bytes = shared;
    for (auto [begin, end] : launch.memory)
      bytes += end - begin;
    Mark *marks = Shadow::room(bytes, launch.blocks, first_block_);
    shared_.resize(shared);
    shared_shadow_ = Shadow(marks);
    marks += shared;
    for (auto [begin, end] : launch.memory) {
      ranges_.push_back({begin, end, false, Shadow(marks)});
      marks += end - begin;
    }
    for (auto [begin, end] : program.read_only)
      ranges_.push_back({begin, end, true, {}});
    ranges_.push_back({parameter(0), parameter(0) + parameters_.size(), true, {}});
    std::sort(ranges_.begin(), ranges_.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
  }

  uint64_t parameter(int offset) const { return reinterpret_cast<uint64_t>(parameters_.data()) + offset; }
  uint64_t local(int lane, int offset) const {
    return reinterpret_cast<uint64_t>(local_.data()) + size_t(local_bytes_) * lane + offset;
  }

  uint64_t block(int64_t number) const { return first_block_ + number; }
  void begin_block() { std::fill(shared_.begin(), shared_.end(), 0xFF); } // NaN

  // The bytes at an address that `actor` reads or writes; `data`: those that a store brings. Throws where it
  // may not.
  uint8_t *at(uint64_t address, int bytes, bool writes, const uint8_t *data, const Actor &actor,
              const Instruction &x) {
    if (address % bytes)
      refuse(x, "an address is not aligned to its " + std::to_string(bytes) + " bytes");
    const uint64_t own = local(actor.lane, 0);
    if (local_bytes_ && address >= own && address + bytes <= own + local_bytes_)
      return reinterpret_cast<uint8_t *>(address);
    Range &range = range_of(address, bytes, x);
    if (!range.constant)
      check_race(range.shadow, address - range.begin, bytes, writes, changes(address, data, bytes), actor,
                 first_block_, x, "global");
    else if (writes)
      refuse(x, "a store into constant memory");
    return reinterpret_cast<uint8_t *>(address);
  }

  uint8_t *at_shared(uint64_t address, int bytes, bool writes, const uint8_t *data, const Actor &actor,
                     const Instruction &x) {
    address = uint32_t(address);
    if (address + bytes > shared_.size())
      refuse(x, "an access lies outside of shared memory");
    if (address % bytes)
      refuse(x, "an address in shared memory is not aligned to its " + std::to_string(bytes) + " bytes");
    if (!writes && !shared_shadow_.written(address, bytes, actor.block))
      refuse(x, "a load from shared memory that nobody wrote");
    uint8_t *found = shared_.data() + address;
    check_race(shared_shadow_, address, bytes, writes, changes(uint64_t(found), data, bytes), actor,
               actor.block, x, "shared");
    return found;
  }

private:
  struct Range {
    uint64_t begin, end;
    bool constant;
    Shadow shadow;
    bool holds(uint64_t address, int bytes) const { return address >= begin && address + bytes <= end; }
  };

  static bool changes(uint64_t address, const uint8_t *data, int bytes) {
    return !data || std::memcmp(reinterpret_cast<const void *>(address), data, bytes);
  }

  static void check_race(Shadow &shadow, size_t offset, int bytes, bool writes, bool changes,
                         const Actor &actor, uint64_t first, const Instruction &x, const char *space) {
    if (!(writes ? shadow.write(offset, bytes, actor, first, changes)
                 : shadow.read(offset, bytes, actor, first)))
      refuse(x, std::string("a race in ") + space +
                    " memory: another thread touches the same bytes, and no barrier orders the two");
  }

  Range &range_of(uint64_t address, int bytes, const Instruction &x) {
    if (ranges_[last_].holds(address, bytes))
      return ranges_[last_];
    auto found = std::upper_bound(ranges_.begin(), ranges_.end(), address,
                                  [](uint64_t a, const Range &range) { return a < range.begin; });
    if (found == ranges_.begin() || !(--found)->holds(address, bytes))
      refuse(x, "an access of " + std::to_string(bytes) + " bytes lies outside of every tensor of the launch");
    last_ = found - ranges_.begin();
    return *found;
  }

  std::string parameters_;
  int local_bytes_;
  std::vector<uint8_t> local_;
  std::vector<Range> ranges_;
  size_t last_ = 0;
  uint64_t first_block_ = 0;
  std::vector<uint8_t> shared_;
  Shadow shared_shadow_;
};

} // namespace ptx
