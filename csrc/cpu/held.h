// Tensors of which everything is asked once, and lists of them that Python prepared: native code keeps their
// handles, which are cheap to ask whether anything has changed.
#pragma once

#include "../names.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
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

// What a tensor says of itself.
struct Tensor {
  void *data = nullptr;
  const int64_t *sizes = nullptr; // of the tensor, or copies of a held list
  int64_t dim = 0, numel = 0, bytes = 0, stored = 0;
  int32_t code = 0, device = 0; // of dtype and type of device
  Type type = Type::other;
  bool contiguous = false, known = false;
  bool usable = false; // its elements may be read and written as an array, on the CPU

  Tensor() = default;
  explicit Tensor(AtenTensorHandle t);

  Dtype dtype() const { return Dtype(int(type)); } // of one that has been checked
  template <class T> T *at() const { return static_cast<T *>(data); }
  // Whether a tensor still says the same. Where it lies in its storage cannot change alone, nor the device of
  // what has an address.
  bool describes(AtenTensorHandle t) const;
};

using Ints = std::vector<int64_t>;

// A list of tensors. One that Python prepared has a generation, which changes when any of its tensors does, and
// names of noise.
struct Tensors : std::vector<Tensor> {
  int64_t generation = 0;
  Ints shapes, tensor_ids, layouts; // layouts: offset, inner and stride of each tensor, one after the other
};

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
inline Tensor::Tensor(AtenTensorHandle t) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  static constexpr int64_t sizes_of_types[] = {4, 2, 2, 1, 8, 8, 1};
  int32_t layout = 0;
  int64_t *lengths = nullptr, dimensions = 0, offset = 0;
  if (aoti_torch_get_dtype(t, &code) || aoti_torch_get_device_type(t, &device) ||
      aoti_torch_get_layout(t, &layout) || layout != strided || aoti_torch_get_dim(t, &dimensions) ||
      aoti_torch_get_sizes(t, &lengths) || aoti_torch_is_contiguous(t, &contiguous))
    return;
  type = type_of(code);
  dim = dimensions; // with its sizes, or a comparison of shapes would read what is not there
  sizes = lengths;
  numel = 1;
  for (int64_t i = 0; i < dim; ++i)
    numel *= sizes[i];
  const int64_t size = sizes_of_types[int(type)];
  bytes = numel * size;
  known = !aoti_torch_get_storage_size(t, &stored) && !aoti_torch_get_storage_offset(t, &offset) &&
          !aoti_torch_get_data_ptr(t, &data);
  usable = device == cpu && contiguous &&
           (numel == 0 || (known && stored / size - offset >= numel && uintptr_t(data) % uintptr_t(size) == 0));
}

inline bool Tensor::describes(AtenTensorHandle t) const {
  void *data_now = nullptr;
  int64_t *sizes_now = nullptr, dim_now = 0, stored_now = 0;
  int32_t code_now = 0, device_now = 0;
  bool contiguous_now = false,
       same = known && !aoti_torch_get_data_ptr(t, &data_now) && data_now == data &&
              !aoti_torch_get_storage_size(t, &stored_now) && stored_now == stored &&
              !aoti_torch_get_dtype(t, &code_now) && code_now == code &&
              (data || (!aoti_torch_get_device_type(t, &device_now) && device_now == device)) &&
              !aoti_torch_is_contiguous(t, &contiguous_now) && contiguous_now == contiguous &&
              !aoti_torch_get_dim(t, &dim_now) && dim_now == dim && !aoti_torch_get_sizes(t, &sizes_now);
  for (int64_t i = 0; same && i < dim; ++i)
    same = sizes[i] == sizes_now[i];
  return same;
}

struct DeleteTensor {
  void operator()(AtenTensorOpaque *handle) const { aoti_torch_delete_tensor_object(handle); }
};
using Handle = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// A list that Python prepared, and what its tensors said last.
class HeldList {
public:
  // Without tensor ids: 0, 1, 2, ...; without layouts: of whole parameters.
  HeldList(std::vector<Handle> handles, Ints tensor_ids, Ints layouts)
      : handles_(std::move(handles)), tensor_ids_(std::move(tensor_ids)), layouts_(std::move(layouts)) {}

  std::shared_ptr<const Tensors> now() {
    const std::lock_guard lock(mutex_);
    const size_t count = handles_.size();
    bool same = last_ != nullptr;
    for (size_t i = 0; same && i < count; ++i) {
      if (i + 2 * kAheadOfLook < count)
        prefetch(impl_of(handles_[i + 2 * kAheadOfLook]));
      if (i + kAheadOfLook < count)
        prefetch(impl_of(handles_[i + kAheadOfLook])[2]); // the storage
      same = (*last_)[i].describes(handles_[i].get());
    }
    if (!same)
      last_ = ask();
    return last_;
  }

private:
  static constexpr size_t kAheadOfLook = 6; // tensors

  // A look at thousands of tensors waits for memory. A handle points to a tensor, and a tensor points to an
  // object. The object's third word points to the storage. If PyTorch changes this, prefetching gains nothing.
  static void *const *impl_of(const Handle &handle) {
    return *reinterpret_cast<void *const *const *>(handle.get());
  }
  static void prefetch(const void *p) {
    for (int line = 0; line < 3; ++line)
      __builtin_prefetch(static_cast<const char *>(p) + 64 * line);
  }

  std::shared_ptr<const Tensors> ask() const {
    static std::atomic<int64_t> generations = 0;
    auto tensors = std::make_shared<Tensors>();
    tensors->generation = ++generations;
    tensors->tensor_ids = tensor_ids_;
    tensors->layouts = layouts_;
    for (const Handle &handle : handles_) {
      const Tensor &t = tensors->emplace_back(handle.get());
      tensors->shapes.insert(tensors->shapes.end(), t.sizes, t.sizes + t.dim);
      if (tensor_ids_.empty())
        tensors->tensor_ids.push_back(int64_t(tensors->size()) - 1);
      const int64_t numel = std::max<int64_t>(t.numel, 1);
      if (layouts_.empty())
        tensors->layouts.insert(tensors->layouts.end(), {0, numel, numel});
    }
    const int64_t *sizes = tensors->shapes.data(); // a tensor's own may change while a kernel runs
    for (Tensor &t : *tensors) {
      t.sizes = sizes;
      sizes += t.dim;
    }
    return tensors;
  }

  const std::vector<Handle> handles_;
  const Ints tensor_ids_, layouts_;
  std::mutex mutex_;
  std::shared_ptr<const Tensors> last_;
};

// By numbers that are never used again. Handles are freed without the lock, as Python may have to be asked.
class HeldLists {
public:
  static HeldLists &all() {
    static auto &lists = *new HeldLists; // handles must not be freed when Python has ended
    return lists;
  }

  int64_t add(std::shared_ptr<HeldList> list) {
    const std::lock_guard lock(mutex_);
    lists_.emplace(++last_, std::move(list));
    return last_;
  }

  // Null for a number that names none.
  std::shared_ptr<HeldList> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto entry = lists_.find(number);
    return entry == lists_.end() ? nullptr : entry->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<HeldList> list = find(number);
    const std::lock_guard lock(mutex_);
    lists_.erase(number);
  }

  size_t size() {
    const std::lock_guard lock(mutex_);
    return lists_.size();
  }

private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<HeldList>> lists_;
  int64_t last_ = 0;
};

} // namespace fogzo::cpu
