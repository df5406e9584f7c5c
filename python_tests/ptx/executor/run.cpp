// Runs a kernel block by block. All threads of a block that stand at one instruction execute it together.
#include "counting.h"

#include <random>

namespace ptx {
namespace {

constexpr Cell kPoison =
    0x7FFDEAD17FFDEAD1ull; // a NaN as float and double: what a register holds that nobody wrote
constexpr int kNowhere = std::numeric_limits<int>::max();

enum class State : uint8_t { ready, stalled, waiting, ended }; // stalled: until the others of its warp arrive

class Block {
public:
  Block(Program &program, const Launch &launch)
      : program_(program), launch_(launch), threads_(launch.threads), warps_((threads_ + kWarp - 1) / kWarp),
        lanes_(warps_ * kWarp), cells_(size_t(program.registers) * lanes_), memory_(program, launch, lanes_),
        random_(launch.order), here_(lanes_), acting_(lanes_), state_(lanes_), at_(lanes_),
        warp_barriers_(warps_) {}

  void run(int64_t number) {
    begin(number);
    while (choose())
      segment();
  }

private:
  Cell *cells(int reg) { return reg < 0 ? nullptr : cells_.data() + size_t(reg) * lanes_; }

  void begin(int64_t number) {
    number_ = number;
    barriers_ = 0;
    if (number ==
        0) // later blocks find what this one left: a fault that they alone have would show as a wrong result
      std::fill(cells_.begin(), cells_.end(), kPoison);
    for (auto [reg, value] : program_.constants)
      std::fill_n(cells(reg), lanes_, value);
    for (auto [reg, offset] : program_.parameters)
      std::fill_n(cells(reg), lanes_, memory_.parameter(offset));
    for (auto [reg, offset] : program_.locals)
      for (int l = 0; l < lanes_; ++l)
        cells(reg)[l] = memory_.local(l, offset);
    for (const auto &[reg, name] : program_.specials)
      for (int l = 0; l < lanes_; ++l)
        cells(reg)[l] = special(name, l);
    memory_.begin_block();
    std::fill(warp_barriers_.begin(), warp_barriers_.end(), 0);
    for (int l = 0; l < lanes_; ++l) {
      state_[l] = l < threads_ ? State::ready : State::ended;
      at_[l] = 0;
    }
  }

  Cell special(const std::string &name, int lane) const {
    if (name == "%tid.x")
      return lane;
    if (name == "%ntid.x")
      return threads_;
    if (name == "%ctaid.x")
      return number_;
    if (name == "%nctaid.x")
      return launch_.blocks;
    if (name == "%laneid")
      return lane % kWarp;
    if (name == "%tid.y" || name == "%tid.z" || name == "%ctaid.y" || name == "%ctaid.z")
      return 0;
    if (name == "%ntid.y" || name == "%ntid.z" || name == "%nctaid.y" || name == "%nctaid.z")
      return 1;
    throw std::runtime_error("no code for the special register " + name);
  }

  // ---- which threads run next

  // Those that stand at the first instruction where any is ready, of all warps or of a random one. False: all
  // have ended.
  bool choose() {
    first_ = 0, last_ = threads_;
    if (launch_.order)
      choose_warp();
    int place = kNowhere, ready = 0;
    for (int l = first_; l < last_; ++l)
      if (state_[l] == State::ready)
        place = std::min(place, at_[l]), ++ready;
    if (!ready)
      return open_barrier();
    int count = 0;
    for (int l = first_; l < last_; ++l) {
      here_[l] = state_[l] <= State::stalled && at_[l] == place;
      if (here_[l])
        state_[l] = State::ready, ++count;
    }
    place_ = place;
    full_ = count == last_ - first_;
    ++program_.segments;
    program_.divergent += count != ready;
    return true;
  }

  void choose_warp() {
    std::vector<int> ready;
    for (int l = 0; l < threads_; ++l)
      if (state_[l] == State::ready && (ready.empty() || ready.back() != l / kWarp))
        ready.push_back(l / kWarp);
    if (ready.empty())
      return;
    first_ = ready[random_() % ready.size()] * kWarp;
    last_ = std::min(first_ + kWarp, threads_);
  }

  // Nobody is ready: lets all go on that wait at one barrier. False: all have ended.
  bool open_barrier() {
    int waiting = 0, ended = 0, place = -1;
    for (int l = 0; l < threads_; ++l) {
      ended += state_[l] == State::ended;
      if (state_[l] == State::waiting) {
        if (++waiting > 1 && at_[l] != place)
          throw std::runtime_error("threads of a block wait at different barriers: lines " + line_of(place) +
                                   " and " + line_of(at_[l]));
        place = at_[l];
      }
    }
    if (ended == threads_)
      return false;
    if (waiting != threads_)
      throw std::runtime_error("deadlock: " + std::to_string(waiting) + " threads wait at a barrier, " +
                               std::to_string(threads_ - waiting - ended) + " for others of their warp, and " +
                               std::to_string(ended) + " have ended");
    ++barriers_;
    for (int l = 0; l < threads_; ++l)
      state_[l] = State::ready;
    return choose();
  }

  std::string line_of(int place) const { return std::to_string(program_.code[place - 1].line); }

  // ---- running them

  // Until they part, wait or end, or may meet others.
  void segment() {
    for (bool first = true;; first = false) {
      if (!first && !full_ && program_.targets[place_])
        return leave();
      Instruction &x = program_.code[place_];
      Lanes lanes = acting(x);
      if (collective(x.kind) && !gather(x, lanes))
        return;
      counter_.count(x, lanes, x.operands ? cells(x.operand[0]) : nullptr, program_.counts[place_]);
      if (x.kind == Kind::branch) {
        if (!branch(x))
          return;
        continue;
      }
      if (x.kind == Kind::end)
        return end(lanes);
      if (x.kind == Kind::barrier)
        return arrive(x, lanes);
      execute(x, lanes);
      ++place_;
    }
  }

  // The threads here whose predicate holds.
  Lanes acting(const Instruction &x) {
    if (x.predicate < 0 || x.kind == Kind::branch)
      return {first_, last_, here_.data(), full_};
    const Cell *predicate = cells(x.predicate);
    bool all = full_;
    for (int l = first_; l < last_; ++l) {
      acting_[l] = here_[l] && (uint8_t(predicate[l]) != 0) != x.negated;
      all &= acting_[l] != 0;
    }
    return {first_, last_, acting_.data(), all};
  }

  // They stand where they are, for choose() to find. Whoever waited for them may try again.
  void leave() {
    for (int l = first_; l < last_; ++l)
      if (here_[l])
        at_[l] = place_;
    wake();
  }

  void wake() {
    for (int l = 0; l < threads_; ++l)
      if (state_[l] == State::stalled)
        state_[l] = State::ready;
  }

  // Whether all go on together.
  bool branch(const Instruction &x) {
    if (x.predicate < 0) {
      place_ = x.target;
      if (full_)
        return true;
      leave();
      return false;
    }
    const Cell *predicate = cells(x.predicate);
    int taken = 0, count = 0;
    for (int l = first_; l < last_; ++l) {
      if (!here_[l])
        continue;
      const bool goes = (uint8_t(predicate[l]) != 0) != x.negated;
      at_[l] = goes ? x.target : place_ + 1;
      taken += goes;
      ++count;
    }
    if (full_ && (taken == 0 || taken == count)) {
      place_ = taken ? x.target : place_ + 1;
      return true;
    }
    wake();
    return false;
  }

  void end(const Lanes &lanes) {
    for (int l = first_; l < last_; ++l) {
      if (!here_[l])
        continue;
      at_[l] = place_ + 1;
      if (lanes.mask[l])
        state_[l] = State::ended;
    }
    wake();
  }

  // bar.sync is aligned: the threads of a warp come to it together.
  void arrive(const Instruction &x, const Lanes &lanes) {
    for (int w = first_ / kWarp; w * kWarp < last_; ++w) {
      int come = 0, all = 0;
      for (int l = w * kWarp; l < std::min((w + 1) * kWarp, threads_); ++l)
        come += lanes.mask[l], ++all;
      if (come && come != all)
        refuse(x, "some threads of a warp come to a barrier without the others");
    }
    for (int l = first_; l < last_; ++l) {
      if (!here_[l])
        continue;
      at_[l] = place_ + 1;
      if (lanes.mask[l])
        state_[l] = State::waiting;
    }
    wake();
  }

  static bool collective(Kind kind) {
    return kind == Kind::warp_barrier || kind == Kind::shuffle || kind == Kind::reduce || kind == Kind::vote ||
           kind == Kind::load_matrix || kind == Kind::store_matrix;
  }

  // A warp-wide instruction names its threads in its last operand. Those of a warp that is not complete wait.
  // False: nobody is left here.
  bool gather(const Instruction &x, Lanes &lanes) {
    const Cell *members = cells(x.operand[x.operands - 1]);
    bool left = false;
    for (int w = first_ / kWarp; w * kWarp < last_; ++w) {
      uint32_t come = 0, named = 0;
      for (int l = 0; l < kWarp; ++l)
        if (const int lane = w * kWarp + l; lane < last_ && lanes.mask[lane])
          come |= 1u << l, named |= uint32_t(members[lane]);
      if (!come)
        continue;
      if (come & ~named)
        refuse(x, "a thread executes it that its mask does not name");
      for (int l = 0; l < kWarp; ++l)
        if (named >> l & 1 && state_[w * kWarp + l] == State::ended)
          refuse(x, "its mask names a thread that has ended");
      if (named != come) {
        left = true;
        stall(w, come);
      } else {
        ++warp_barriers_[w];
      }
    }
    if (!left)
      return true;
    full_ = lanes.full = false;
    return std::any_of(here_.begin() + first_, here_.begin() + last_, [](uint8_t h) { return h; });
  }

  void stall(int warp, uint32_t come) {
    for (int l = 0; l < kWarp; ++l) {
      const int lane = warp * kWarp + l;
      if (!(come >> l & 1))
        continue;
      here_[lane] = acting_[lane] = 0;
      at_[lane] = place_;
      state_[lane] = State::stalled;
    }
  }

  // ---- instructions

  void execute(const Instruction &x, const Lanes &lanes) {
    Cell *result[kMaxOperands], *operand[kMaxOperands];
    for (int i = 0; i < x.results; ++i)
      result[i] = cells(x.result[i]);
    for (int i = 0; i < x.operands; ++i)
      operand[i] = cells(x.operand[i]);
    switch (x.kind) {
    case Kind::arithmetic:
      return x.run(result, operand, lanes);
    case Kind::pack:
      return for_each(lanes, [&](int l) { pack(x, result, operand, l); });
    case Kind::unpack:
      return for_each(lanes, [&](int l) { unpack(x, result, operand, l); });
    case Kind::load:
    case Kind::store:
    case Kind::add:
      return access(x, result, operand, lanes);
    case Kind::shuffle:
      return shuffle(x, result, operand, lanes);
    case Kind::reduce:
    case Kind::vote:
      return reduce(x, result, operand, lanes);
    case Kind::load_matrix:
    case Kind::store_matrix:
      return matrices(x, result, operand, lanes, [&](int lane, uint64_t address) {
        return bytes_at(x, address, 16, x.kind == Kind::store_matrix, nullptr, actor(lane));
      });
    case Kind::warp_barrier:
    case Kind::branch:
    case Kind::end:
    case Kind::barrier:
      return;
    }
  }

  static Cell low(Cell cell, int bytes) { return bytes == 8 ? cell : cell & ((Cell(1) << 8 * bytes) - 1); }

  static void pack(const Instruction &x, Cell **result, Cell **operand, int l) {
    Cell found = 0;
    for (int i = 0; i < x.operands; ++i)
      found |= low(operand[i][l], x.width) << 8 * x.width * i;
    result[0][l] = found;
  }

  static void unpack(const Instruction &x, Cell **result, Cell **operand, int l) {
    const Cell whole = operand[0][l];
    for (int i = 0; i < x.results; ++i)
      if (result[i])
        result[i][l] = low(whole >> 8 * x.width * i, x.width);
  }

  Actor actor(int lane, bool atomic = false) const {
    Actor who{};
    who.block = memory_.block(number_);
    who.barriers = barriers_;
    who.warp_barriers = warp_barriers_[lane / kWarp];
    who.lane = lane;
    who.atomic = atomic;
    return who;
  }

  uint8_t *bytes_at(const Instruction &x, uint64_t address, int bytes, bool writes, const uint8_t *data,
                    const Actor &who) {
    if (x.space == Space::shared)
      return memory_.at_shared(address, bytes, writes, data, who, x);
    return memory_.at(address, bytes, writes, data, who, x);
  }

  void access(const Instruction &x, Cell **result, Cell **operand, const Lanes &lanes) {
    const int bytes = x.width * x.count;
    uint8_t data[32];
    for_each(lanes, [&](int l) {
      const uint64_t address = operand[0][l] + x.immediate;
      if (x.kind == Kind::store) {
        for (int i = 0; i < x.count; ++i)
          std::memcpy(data + x.width * i, &operand[1 + i][l], x.width);
        std::memcpy(bytes_at(x, address, bytes, true, data, actor(l)), data, bytes);
      } else if (x.kind == Kind::add) {
        uint8_t *at = bytes_at(x, address, bytes, true, nullptr, actor(l, true));
        const Cell before = value_at(at, x);
        const Cell sum = before + operand[1][l];
        std::memcpy(at, &sum, bytes);
        if (x.results && result[0])
          result[0][l] = before;
      } else {
        const uint8_t *at = bytes_at(x, address, bytes, false, nullptr, actor(l));
        for (int i = 0; i < x.count; ++i, at += x.width)
          if (result[i])
            result[i][l] = value_at(at, x);
      }
    });
  }

  static Cell value_at(const uint8_t *at, const Instruction &x) {
    Cell value = 0;
    std::memcpy(&value, at, x.width);
    if (x.is_signed && x.width < 8 && value >> (8 * x.width - 1))
      value |= ~Cell(0) << 8 * x.width;
    return value;
  }

  Program &program_;
  const Launch &launch_;
  const int threads_, warps_, lanes_;
  std::vector<Cell> cells_; // by register, then by lane
  Memory memory_;
  std::mt19937_64 random_;
  int64_t number_ = 0;
  uint64_t barriers_ = 0;

  // The group that runs: its lanes lie from first_ up to last_, all of them where it is full.
  int first_ = 0, last_ = 0, place_ = 0;
  bool full_ = false;
  std::vector<uint8_t> here_, acting_;

  std::vector<State> state_;
  std::vector<int> at_; // where each thread goes on
  std::vector<uint64_t> warp_barriers_;
  Counter counter_;
};

} // namespace

void run(Program &program, const Launch &launch) {
  if (program.targets.size() != program.code.size() + 1) {
    program.targets.assign(program.code.size() + 1, 0);
    for (const Instruction &x : program.code)
      if (x.kind == Kind::branch)
        program.targets[x.target] = 1;
  }
  Block block(program, launch);
  for (int64_t number = 0; number < launch.blocks; ++number)
    block.run(number);
}

} // namespace ptx
