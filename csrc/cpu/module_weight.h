// The weight of one module, which quantizes it in each forward. The list ops would take longer over their
// arguments than the kernel does over a small weight.
#pragma once

#include "call.h"

#include <cstdlib>

namespace fogzo::cpu {

// Holds the latent and the alpha of a module, and the least value of a learned alpha. A call that returns false
// has written nothing. Python's checks then find the reason.
class ModuleWeight {
public:
  // `number`: of the held list (latent, alpha) or (latent, alpha, least), which Python keeps.
  ModuleWeight(int64_t number, int64_t qmin, int64_t qmax, double offset, int64_t r, int64_t block,
               const std::string &straight_through, double factor, double most, bool named)
      : list_(HeldLists::all().find(number)), grid_(GridRange{float(qmin), float(qmax), float(offset)}), r_(r),
        block_(block), straight_through_(value_of<StraightThrough>(straight_through, "straight_through")),
        factor_(factor), most_(most), named_(named) {
    require(list_ != nullptr, "number");
  }

  // Q into a tensor like the latent.
  bool quantize(uintptr_t out) const {
    const auto state = now();
    if (!state->usable || !alpha_holds(*state) || other_backend())
      return false;
    Operands item = state->item;
    item.plus = {reinterpret_cast<void *>(out), item.latent.dtype};
    run(kernels().quantize, {item}, grid_, float(r_));
    return true;
  }

  // The gradients of the latent, into a tensor like it, and of alpha, where there is a tensor for it, from
  // dL/dQ.
  bool backward(uintptr_t out, uintptr_t grad, uintptr_t alpha_grad) const {
    const auto state = now();
    if (!state->usable || !alpha_holds(*state))
      return false;
    Operands item = state->item;
    item.plus = {reinterpret_cast<void *>(out), item.latent.dtype};
    item.grad = {reinterpret_cast<void *>(grad), item.latent.dtype};
    if (!alpha_grad) {
      run(kernels().straight_through, {item}, straight_through_, grid_, float(r_));
      return true;
    }
    item.alpha_grad = reinterpret_cast<float *>(alpha_grad);
    item.factor = factor_;
    run_learned({item}, straight_through_, grid_, float(r_));
    return true;
  }

private:
  struct State {
    int64_t generation = 0;
    bool usable = false;
    Operands item;
    Tensor alpha;
    const float *least = nullptr;
  };

  std::shared_ptr<const State> now() const {
    const auto tensors = list_->now();
    const std::lock_guard lock(mutex_);
    if (!state_ || state_->generation != tensors->generation)
      state_ = made(*tensors);
    return state_;
  }

  std::shared_ptr<const State> made(const Tensors &tensors) const {
    auto state = std::make_shared<State>();
    state->generation = tensors.generation;
    try {
      const Tensors latents = one(tensors[0]), alphas = one(tensors[1]);
      Lists lists(latents);
      lists.read(&Operands::latent, latents, kFloats);
      lists.set_cells(alphas, 1, false);
      lists.set_transform(block_, 1);
      state->item = lists.items[0];
      state->alpha = tensors[1];
      if (tensors.size() > 2) {
        check_list(one(tensors[2]), kFloat32, alphas, 1);
        state->least = tensors[2].at<const float>();
      }
      state->usable = state->item.numel > 0;
    } catch (const std::runtime_error &) { // Python's checks word it
    }
    return state;
  }

  static Tensors one(const Tensor &t) {
    Tensors list;
    list.push_back(t);
    return list;
  }

  // Whether alpha may be used, and whether a learned one is where it is held.
  bool alpha_holds(const State &state) const {
    const float *const alpha = state.alpha.at<const float>();
    unsigned outside = 0;
    for (int64_t i = 0; state.least && i < state.alpha.numel; ++i)
      outside |= unsigned(!(alpha[i] >= state.least[i])) | unsigned(!(double(alpha[i]) <= most_));
    return !outside && in_range(state.alpha, r_);
  }

  // Whether the environment asks for another backend than this one.
  bool other_backend() const {
    const char *const asked = named_ ? nullptr : std::getenv("FOGZO_BACKEND");
    return asked && *asked;
  }

  const std::shared_ptr<HeldList> list_;
  const GridRange grid_;
  const int64_t r_, block_;
  const StraightThrough straight_through_;
  const double factor_, most_;
  const bool named_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const State> state_;
};

} // namespace fogzo::cpu
