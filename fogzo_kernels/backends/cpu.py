"""C++ on the CPU (csrc/cpu): lists of tensors in one call, spread over PyTorch's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # registers torch.ops.fogzo_cpu; an ImportError is the reason shown
from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.noise import DISTRIBUTIONS
from ..spec.straight_through import StraightThrough
from .held import Held

Tensors = Sequence[Tensor]
native = torch.ops.fogzo_cpu
#: The native ops refuse by themselves, by a RuntimeError and before anything is written, all that
#: fogzo_kernels/ops refuses of lists on the CPU. A draw for a held list has no names: native code has them.
CHECKS_LISTS = True


def unavailable(device: torch.device) -> str | None:
    """None on the CPU."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    native.noise(out, *drawn(draw), direction)
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool, per_tensor: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32; whatever the number of threads."""
    out = torch.empty(len(grads) if per_tensor else (), dtype=torch.float64)
    sum_squares(out, grads, alphas, r)
    return out.sqrt_().float() if root else out


# ---- ops that a native op serves as it is


def flattened(op: str) -> Callable[..., None]:
    """The function of :class:`Backend` with the arguments of this native op, in groups.

    A list that native code holds goes by its number, in the place of one without tensors.
    """
    native_op = getattr(native, op).default
    lists = [i for i, a in enumerate(native_op._schema.arguments) if str(a.type) == "List[Tensor]"]
    prepared = [i for i in lists if native_op._schema.arguments[i].name not in ("counters", "factors")]

    def run(*args: Any) -> None:
        flat: list[Any] = []
        for arg in args:
            parts = FLAT.get(type(arg))
            if parts is None:
                flat.append(arg)
            else:
                flat += parts(arg)
        numbers = [flat[i].number if isinstance(flat[i], Held) else 0 for i in prepared]
        if any(numbers):
            for i, number in zip(prepared, numbers, strict=True):
                if number:
                    flat[i] = ()
            flat.append(numbers)
        native_op(*flat)

    return run


def drawn(draw: Draw) -> tuple[Any, ...]:
    """Distribution and its C, seed, step, tensor ids, and layouts in a row."""
    C = DISTRIBUTIONS.get(draw.distribution, 0.0)  # the op names the known ones
    return draw.distribution, C, draw.seed, draw.step, draw.tensor_ids, [*chain.from_iterable(draw.layouts)]


def updating(update: Update) -> tuple[Any, ...]:
    """The rule's variant, its hyperparameters' names and values, lr, the optimizer's step, its memory."""
    h = update.rule.hyperparameters
    rule = update.rule.variant, list(h), list(h.values())
    return *rule, update.lr, update.optimizer_step, update.masters, *(*update.states, [], [])[:2]


#: The groups of ``spec/call.py`` as native ops take them (csrc/cpu/call.h).
FLAT: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    Draw: drawn,
    Mix: lambda mix: (*mix[:3], [] if mix.factors is None else [mix.factors]),
    Measure: tuple,
    Losses: lambda losses: (
        losses.plus, losses.minus, [] if losses.counters is None else [losses.counters], losses.guided,
    ),
    Grid: lambda grid: (grid.qmin, grid.qmax, grid.offset, grid.r),
    StraightThrough: lambda straight_through: (straight_through.variant,),
    Update: updating,
}  # fmt: skip

sum_squares = flattened("guide_sumsq")
perturb_quantize_ = flattened("perturb_quantize")
estimate_gradient_ = flattened("estimate_gradient")
estimate_update_ = flattened("estimate_update")
measure_alphas_ = flattened("measure_alphas")
hadamard_ = flattened("hadamard")


# ---- what each module calls by itself


class ModuleWeight:
    """The weight of one module (csrc/cpu/module_weight.h). A call that returns False has written nothing.

    It refuses alphas out of their range. It refuses, too, where the environment asks for another backend.
    """

    def __init__(
        self, tensors: Held, grid: Grid, straight_through: StraightThrough, factor: float, block: int,
        most: float, named: bool,
    ) -> None:  # fmt: skip
        """``tensors``: the weight, alpha and the least value of a learned alpha, which may be ``most`` at most.

        ``named``: whether the environment cannot ask for another backend.
        """
        self._tensors = tensors
        numbers = grid.qmin, grid.qmax, grid.offset, grid.r, block
        self._native = _C.ModuleWeight(tensors.number, *numbers, straight_through.variant, factor, most, named)

    def quantize(self, out: Tensor) -> bool:
        """Write Q into a tensor like the weight."""
        done: bool = self._native.quantize(out.data_ptr())
        return done

    def backward(self, out: Tensor, grad: Tensor, alpha_grad: Tensor | None) -> bool:
        """Write the gradients of the weight and of alpha, which is None unless it learns, from dL/dQ."""
        address = 0 if alpha_grad is None else alpha_grad.data_ptr()
        done: bool = self._native.backward(out.data_ptr(), grad.data_ptr(), address)
        return done


# ---- those that a module calls, with less work for lists that are not held

HELD = {name: flattened(name) for name in ("quantize", "straight_through_backward", "learned_backward")}


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None:
    if isinstance(latents, Held):
        return HELD["quantize"](out, latents, alphas, grid, block)
    native.quantize(out, latents, alphas, grid.qmin, grid.qmax, grid.offset, grid.r, block)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    lists = out, grads, latents, alphas
    if isinstance(latents, Held):
        return HELD["straight_through_backward"](*lists, grid, straight_through, block)
    numbers = grid.qmin, grid.qmax, grid.offset, grid.r
    native.straight_through_backward(*lists, *numbers, straight_through.variant, block)


def learned_backward_(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough, factors: Sequence[float], block: int,
) -> None:  # fmt: skip
    lists = out, alpha_grads, grads, latents, alphas
    if isinstance(latents, Held):
        return HELD["learned_backward"](*lists, grid, straight_through, factors, block)
    numbers = grid.qmin, grid.qmax, grid.offset, grid.r
    native.learned_backward(*lists, *numbers, straight_through.variant, factors, block)
