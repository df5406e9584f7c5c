// Finds races: who touched each byte of memory last, and whether a barrier lies between that access and the
// next one.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace ptx {

// A thread at a point of its run. Numbers of barriers tell what is ordered: within a block those of the block,
// within a warp also its own warp-wide instructions.
struct Actor {
  uint64_t block : 28; // over all launches, so that old marks need not be wiped; 0: nobody
  uint64_t barriers : 12, warp_barriers : 10, lane : 10, others : 2, atomic : 1;
};
enum Others { none, of_block, of_grid }; // who else read it, too, and is not ordered either

struct Mark {
  Actor writer, reader;
};

// The marks of a range of bytes, among those that all ranges of this thread of the host share.
class Shadow {
public:
  Shadow() = default;
  Shadow(Mark *marks) : marks_(marks) {}

  // Whether the access is safe: whatever came before it from other threads is ordered before it. Blocks below
  // `first` are of the past.
  bool read(size_t at, int count, const Actor &actor, uint64_t first) {
    bool safe = true;
    for (Mark *mark = marks_ + at, *end = mark + count; mark != end; ++mark) {
      safe &= ordered(mark->writer, actor, first);
      note(mark->reader, actor, first);
    }
    return safe;
  }
  // `changes`: else the bytes are there already. Threads may store the same value side by side, as Triton lets
  // them do where a tile has fewer elements than a block has threads.
  bool write(size_t at, int count, const Actor &actor, uint64_t first, bool changes) {
    bool safe = true;
    for (Mark *mark = marks_ + at, *end = mark + count; mark != end; ++mark) {
      const bool follows = ordered(mark->writer, actor, first) && ordered(mark->reader, actor, first);
      safe &= follows || !changes;
      if (follows || changes)
        mark->writer = actor;
    }
    return safe;
  }
  bool written(size_t at, int count, uint64_t first) const {
    for (int i = 0; i < count; ++i)
      if (marks_[at + i].writer.block < first)
        return false;
    return true;
  }

  // Room for ranges of `bytes` in all, and the first number of `blocks` new blocks.
  static Mark *room(size_t bytes, uint64_t blocks, uint64_t &first) {
    static thread_local std::vector<Mark> marks;
    static thread_local uint64_t next = 1;
    if (next + blocks >= uint64_t(1) << 28) {
      std::memset(static_cast<void *>(marks.data()), 0, marks.size() * sizeof(Mark));
      next = 1;
    }
    if (marks.size() < bytes)
      marks.resize(bytes);
    first = next;
    next += blocks;
    return marks.data();
  }

private:
  static bool ordered(const Actor &before, const Actor &now, uint64_t first) {
    if (before.block < first || (before.atomic && now.atomic))
      return true;
    if (before.block != now.block || before.others == of_grid)
      return false;
    if (before.barriers != now.barriers)
      return true;
    if (before.others == of_block)
      return false;
    return before.lane == now.lane ||
           (before.lane / 32 == now.lane / 32 && before.warp_barriers != now.warp_barriers);
  }
  static void note(Actor &reader, const Actor &now, uint64_t first) {
    if (ordered(reader, now, first))
      reader = now;
    else
      reader.others = reader.block != now.block || reader.others == of_grid ? of_grid : of_block;
  }

  Mark *marks_ = nullptr;
};

} // namespace ptx
