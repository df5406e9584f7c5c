// Named argument checks for the native entry points. The Python layer reports bad input with more
// detail; these keep a direct caller of the native ops from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace fogzo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline void check_cpu_contiguous(const Tensor &t, const std::string &name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// A list that goes element by element with `like`; empty is allowed where `optional`.
inline void check_list(const TensorList &list, const TensorList &like, const std::string &name, bool optional,
                       bool same_numel = true) {
  if (optional && list.empty())
    return;
  STD_TORCH_CHECK(list.size() == like.size(), name, " must have ", like.size(), " tensors, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string item = name + "[" + std::to_string(i) + "]";
    check_cpu_contiguous(list[i], item);
    STD_TORCH_CHECK(!same_numel || list[i].numel() == like[i].numel(), item, " must have ", like[i].numel(),
                    " elements, got ", list[i].numel());
  }
}

inline void check_alphas(const TensorList &alphas, const TensorList &like) {
  check_list(alphas, like, "alphas", false, false);
  for (size_t i = 0; i < alphas.size(); ++i) {
    const int64_t scales = alphas[i].numel(), numel = like[i].numel();
    STD_TORCH_CHECK(alphas[i].scalar_type() == ScalarType::Float, "alphas[", i, "] must be float32");
    STD_TORCH_CHECK(numel == 0 || (scales > 0 && numel % scales == 0), "alphas[", i,
                    "] must have a number of elements that divides ", numel, ", got ", scales);
  }
}

inline void check_scalar(const Tensor &t, ScalarType dtype, const char *name) {
  check_cpu_contiguous(t, name);
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == dtype, name, " must be a scalar of the pinned dtype");
}

// layouts holds offset, inner, stride of each tensor, one after the other.
inline void check_names(const std::vector<int64_t> &tensor_ids, const std::vector<int64_t> &layouts,
                        const TensorList &like) {
  STD_TORCH_CHECK(tensor_ids.size() == like.size(), "tensor_ids must have ", like.size(), " entries, got ",
                  tensor_ids.size());
  STD_TORCH_CHECK(layouts.size() == 3 * like.size(), "layouts must have ", 3 * like.size(), " entries, got ",
                  layouts.size());
  constexpr int64_t kLimit = int64_t(1) << 51;
  for (size_t i = 0; i < like.size(); ++i) {
    const int64_t offset = layouts[3 * i], inner = layouts[3 * i + 1], stride = layouts[3 * i + 2];
    STD_TORCH_CHECK(offset >= 0 && offset < kLimit && inner >= 1 && stride >= 1 && stride < kLimit, "layouts[",
                    i, "] must be (offset >= 0, inner >= 1, stride >= 1), got (", offset, ", ", inner, ", ",
                    stride, ")");
    STD_TORCH_CHECK(tensor_ids[i] >= 0 && tensor_ids[i] < (int64_t(1) << 32) - 1, "tensor_ids[", i,
                    "] must be in 0..2^32-2, got ", tensor_ids[i]);
  }
}

} // namespace fogzo
