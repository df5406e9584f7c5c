// The arguments of an op as the dispatcher hands them over (LibTorch's stable ABI): a reader that takes them
// off the stack in the schema's order, and tensors of which everything is asked once.
#pragma once

#include "../names.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fogzo::cpu {

// Refuses a call that cannot be served. The checks of fogzo_kernels/ops word what was wrong.
inline void require(bool holds, const char *reason) {
  if (__builtin_expect(!holds, 0))
    throw std::runtime_error(std::string("refused: ") + reason);
}

// Types of elements that some argument may have; the first four are Dtype's.
enum class Type { FOGZO_DTYPES(FOGZO_ENUMERATOR) float64, int64, other };

constexpr unsigned bit(Type type) { return 1u << int(type); }
constexpr unsigned kFloat32 = bit(Type::float32);
constexpr unsigned kFloats = kFloat32 | bit(Type::bfloat16) | bit(Type::float16);
constexpr unsigned kOutputs = kFloats | bit(Type::int8);

struct DeleteTensor {
  void operator()(AtenTensorOpaque *handle) const { aoti_torch_delete_tensor_object(handle); }
};

// A tensor and what it says of itself.
struct Tensor {
  std::unique_ptr<AtenTensorOpaque, DeleteTensor> handle;
  void *data = nullptr;
  const int64_t *sizes = nullptr; // of the handle
  int64_t dim = 0, numel = 0, bytes = 0;
  Type type = Type::other;
  bool usable; // its elements may be read and written as an array

  explicit Tensor(AtenTensorHandle owned) : handle(owned) { usable = read(); }

  Dtype dtype() const { return Dtype(int(type)); } // of one that has been checked
  template <class T> T *at() const { return static_cast<T *>(data); }

private:
  bool read();
};

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

inline Type type_of(int32_t code) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_int8(),
                                  aoti_torch_dtype_float64(), aoti_torch_dtype_int64()};
  static_assert(sizeof codes / sizeof *codes == size_t(Type::other), "one code for each type");
  int i = 0;
  while (i < int(Type::other) && code != codes[i])
    ++i;
  return Type(i);
}

// A storage may hold fewer elements than the tensor says (FSDP frees storages between steps), at any address
// (torch.frombuffer), or something else (oneDNN, sparse).
inline bool Tensor::read() {
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  static constexpr int64_t sizes_of_types[] = {4, 2, 2, 1, 8, 8, 1};
  AtenTensorOpaque *const t = handle.get();
  int32_t device = 0, layout = 0, code = 0;
  bool contiguous = false;
  int64_t *lengths = nullptr, dimensions = 0, offset = 0, stored = 0;
  if (aoti_torch_get_dtype(t, &code) || aoti_torch_get_device_type(t, &device) || device != cpu ||
      aoti_torch_get_layout(t, &layout) || layout != strided || aoti_torch_get_dim(t, &dimensions) ||
      aoti_torch_get_sizes(t, &lengths) || aoti_torch_is_contiguous(t, &contiguous) || !contiguous)
    return false;
  type = type_of(code);
  dim = dimensions; // with its sizes, or a comparison of shapes would read what is not there
  sizes = lengths;
  numel = 1;
  for (int64_t i = 0; i < dim; ++i)
    numel *= sizes[i];
  const int64_t size = sizes_of_types[int(type)];
  bytes = numel * size;
  return numel == 0 || (!aoti_torch_get_storage_size(t, &stored) &&
                        !aoti_torch_get_storage_offset(t, &offset) && stored / size - offset >= numel &&
                        !aoti_torch_get_data_ptr(t, &data) && uintptr_t(data) % uintptr_t(size) == 0);
}

// Takes the arguments off the stack; a list's elements are the reader's own. Nothing is checked here, so that
// whatever is refused later, all has been taken and is freed.
class Arguments {
public:
  explicit Arguments(StableIValue *stack) : next_(stack) {}

  int64_t integer() { return torch::stable::detail::to<int64_t>(*next_++); }
  double number() { return torch::stable::detail::to<double>(*next_++); }
  std::string text() { return text_of(*next_++); }
  Tensor tensor() { return tensor_of(*next_++); }
  Tensors tensors() { return list<Tensor>(tensor_of); }
  Ints integers() { return list<int64_t>(torch::stable::detail::to<int64_t>); }
  std::vector<double> numbers() { return list<double>(torch::stable::detail::to<double>); }
  std::vector<std::string> texts() { return list<std::string>(text_of); }

private:
  static Tensor tensor_of(StableIValue value) {
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
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

  template <class T, class Convert> std::vector<T> list(Convert convert) {
    const auto handle = torch::stable::detail::to<StableListHandle>(*next_++);
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
};

// The dispatcher's form of an op without results.
template <void (*op)(Arguments)> void boxed(StableIValue *stack, uint64_t, uint64_t) { op(Arguments(stack)); }

} // namespace fogzo::cpu
