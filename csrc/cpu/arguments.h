// The arguments of an op as the dispatcher hands them over (LibTorch's stable ABI): a reader that takes them
// off the stack in the schema's order.
#pragma once

#include "held.h"

#include <string>

namespace fogzo::cpu {

// Takes the arguments off the stack; the reader owns what it has taken. Nothing is checked here, so that
// whatever is refused later, all has been taken and is freed.
class Arguments {
public:
  // `held`: the last argument of an op over lists, the numbers of the lists that Python prepared, each in the
  // place of a list that is empty; 0 where there is none.
  explicit Arguments(StableIValue *stack, const StableIValue *held = nullptr) : next_(stack) {
    if (held)
      held_ = list<int64_t>(*held, torch::stable::detail::to<int64_t>);
  }

  int64_t integer() { return torch::stable::detail::to<int64_t>(*next_++); }
  bool boolean() { return torch::stable::detail::to<bool>(*next_++); }
  double number() { return torch::stable::detail::to<double>(*next_++); }
  std::string text() { return text_of(*next_++); }
  Tensor tensor() { return Tensor(handle_of(*next_++)); }
  Ints integers() { return list<int64_t>(*next_++, torch::stable::detail::to<int64_t>); }
  std::vector<double> numbers() { return list<double>(*next_++, torch::stable::detail::to<double>); }
  std::vector<std::string> texts() { return list<std::string>(*next_++, text_of); }
  std::vector<Handle> handles() {
    return list<Handle>(*next_++, [](StableIValue value) {
      return Handle(torch::stable::detail::to<AtenTensorHandle>(value));
    });
  }

  // A list that is never prepared.
  const Tensors &given_tensors() {
    std::vector<Handle> given = handles();
    if (given.empty())
      return none();
    Tensors tensors;
    tensors.reserve(given.size());
    for (Handle &handle : given) {
      tensors.emplace_back(handle.get());
      handles_.push_back(std::move(handle));
    }
    return *lists_.emplace_back(std::make_shared<const Tensors>(std::move(tensors)));
  }

  // A list in the next place of `held`.
  const Tensors &tensors() {
    const Tensors &given = given_tensors();
    const int64_t number = generations_.size() < held_.size() ? held_[generations_.size()] : 0;
    if (number)
      lists_.push_back(given.empty() ? held_tensors(number) : unusable());
    const Tensors &tensors = number ? *lists_.back() : given;
    generations_.push_back(tensors.generation);
    all_held_ = all_held_ && (tensors.generation || tensors.empty());
    return tensors;
  }

  // Of the lists that may be prepared, 0 for an empty one; null where some list is not prepared.
  const Ints *generations() const { return all_held_ ? &generations_ : nullptr; }

private:
  static const Tensors &none() {
    static const Tensors tensors;
    return tensors;
  }

  static std::shared_ptr<const Tensors> unusable() {
    Tensors tensors;
    tensors.emplace_back();
    return std::make_shared<const Tensors>(std::move(tensors));
  }

  // As it is now; for a number that names no list, a tensor that every op refuses.
  std::shared_ptr<const Tensors> held_tensors(int64_t number) {
    held_lists_.push_back(HeldLists::all().find(number));
    return held_lists_.back() ? held_lists_.back()->now() : unusable();
  }

  AtenTensorHandle handle_of(StableIValue value) {
    handles_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(value));
    return handles_.back().get();
  }

  // to<std::string>() leaks the string
  static std::string text_of(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char *data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }

  template <class T, class Convert> static std::vector<T> list(StableIValue given, Convert convert) {
    const auto handle = torch::stable::detail::to<StableListHandle>(given);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
    std::vector<T> values;
    values.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue value = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, i, &value));
      values.push_back(convert(value));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(handle));
    return values;
  }

  StableIValue *next_;
  Ints held_, generations_;
  bool all_held_ = true;
  std::vector<Handle> handles_;
  std::vector<std::shared_ptr<HeldList>> held_lists_; // which another thread may release
  std::vector<std::shared_ptr<const Tensors>> lists_;
};

// The dispatcher's form of an op without results, and of one over lists.
template <void (*op)(Arguments)> void boxed(StableIValue *stack, uint64_t, uint64_t) { op(Arguments(stack)); }
template <void (*op)(Arguments)> void boxed_lists(StableIValue *stack, uint64_t inputs, uint64_t) {
  op(Arguments(stack, stack + inputs - 1));
}

} // namespace fogzo::cpu
