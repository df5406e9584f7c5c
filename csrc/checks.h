// Named argument checks for the native entry points. The Python layer reports bad input with more
// detail; these keep a direct caller of the native ops from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <vector>

namespace fogzo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// An argument, or one tensor of a list; only a failed check makes a string of it.
struct Name {
  const char *argument;
  int64_t index;
  Name(const char *argument, size_t index) : argument(argument), index(int64_t(index)) {}
  Name(const char *argument) : argument(argument), index(-1) {}
};

inline std::ostream &operator<<(std::ostream &out, const Name &name) {
  out << name.argument;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}

inline void check_range(int64_t value, int64_t first, int64_t last, const Name &name) {
  STD_TORCH_CHECK(first <= value && value <= last, name, " must be in ", first, "..", last, ", got ", value);
}

inline void check_dtype(const Tensor &t, ScalarType dtype, const Name &name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// A tensor says how many elements it has; its storage may hold fewer (FSDP frees storages between
// steps), at any address (torch.frombuffer), or something else than elements (oneDNN, sparse).
inline void check_memory(const Tensor &t, const Name &name) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t size = int64_t(t.element_size()), needed = (t.storage_offset() + t.numel()) * size;
  STD_TORCH_CHECK(needed <= bytes, name, " must have a storage of at least ", needed, " bytes, got ", bytes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % uintptr_t(size) == 0, name,
                  " must be aligned to its elements of ", size, " bytes");
}

inline void check_cpu_contiguous(const Tensor &t, const Name &name) {
  STD_TORCH_CHECK(t.defined() && t.is_cpu(), name, " must be a tensor on the CPU");
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, " must have the strided layout");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  if (t.numel())
    check_memory(t, name);
}

// A list that goes element by element with `like`; empty is allowed where `optional`.
inline void check_list(const TensorList &list, const TensorList &like, const char *name, bool optional,
                       bool same_numel = true) {
  if (optional && list.empty())
    return;
  STD_TORCH_CHECK(list.size() == like.size(), name, " must have ", like.size(), " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Name item(name, i);
    check_cpu_contiguous(list[i], item);
    STD_TORCH_CHECK(!same_numel || list[i].numel() == like[i].numel(), item, " must have ", like[i].numel(),
                    " elements, got ", list[i].numel());
  }
}

inline void check_alphas(const TensorList &alphas, const TensorList &like) {
  check_list(alphas, like, "alphas", false, false);
  for (size_t i = 0; i < alphas.size(); ++i) {
    const int64_t scales = alphas[i].numel(), numel = like[i].numel();
    check_dtype(alphas[i], ScalarType::Float, {"alphas", i});
    STD_TORCH_CHECK(numel == 0 || (scales > 0 && numel % scales == 0), "alphas[", i,
                    "] must have a number of elements that divides ", numel, ", got ", scales);
  }
}

inline void check_scalar(const Tensor &t, ScalarType dtype, const char *name) {
  check_cpu_contiguous(t, name);
  check_dtype(t, dtype, name);
  STD_TORCH_CHECK(t.numel() == 1, name, " must have 1 element, got ", t.numel());
}

// layouts holds offset, inner, stride of each tensor, one after the other.
inline void check_names(const std::vector<int64_t> &tensor_ids, const std::vector<int64_t> &layouts,
                        const TensorList &like) {
  STD_TORCH_CHECK(tensor_ids.size() == like.size(), "tensor_ids must have ", like.size(), " entries, got ",
                  tensor_ids.size());
  STD_TORCH_CHECK(layouts.size() == 3 * like.size(), "layouts must have ", 3 * like.size(), " entries, got ",
                  layouts.size());
  constexpr int64_t kLimit = int64_t(1) << 51; // of elements
  for (size_t i = 0; i < like.size(); ++i) {
    const int64_t offset = layouts[3 * i], inner = layouts[3 * i + 1], stride = layouts[3 * i + 2];
    const int64_t numel = like[i].numel(), rows = inner >= 1 && numel ? (numel - 1) / inner : 0;
    STD_TORCH_CHECK(offset >= 0 && inner >= 1 && stride >= 1 && (rows == 0 || stride >= inner), "layouts[", i,
                    "] must be (offset >= 0, inner >= 1, stride >= inner), got (", offset, ", ", inner, ", ",
                    stride, ")");
    const int64_t columns = std::min(inner, std::max<int64_t>(numel, 1)); // by division: a product may overflow
    STD_TORCH_CHECK(columns <= kLimit && offset <= kLimit - columns &&
                        (rows == 0 || stride <= (kLimit - columns - offset) / rows),
                    "layouts[", i, "] must keep element indices below 2^51, got (", offset, ", ", inner, ", ",
                    stride, ") for ", numel, " elements");
    check_range(tensor_ids[i], 0, (int64_t(1) << 32) - 2, {"tensor_ids", i});
  }
}

} // namespace fogzo
