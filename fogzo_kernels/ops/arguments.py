"""Public arguments as the ops take them: lists of tensors, tensors for numbers, flat layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.held import Held
from ..spec.grid import Grid
from ..spec.noise import MAX_SEED, MAX_STEP, Layout, check_range, signed64
from ..spec.straight_through import StraightThrough
from . import checks

TensorOrList = Tensor | Sequence[Tensor]
#: Of whole numbers, exclusive.
LIMITS = {"seed": MAX_SEED, "step": MAX_STEP, "optimizer_step": 2**63}


def tensors(name: str, given: TensorOrList) -> Sequence[Tensor]:
    """A list of tensors, or one that is held; a bare tensor is a list of one."""
    if type(given) is not list:
        if isinstance(given, Held):
            return given
        if isinstance(given, Tensor):
            return [given]
        if not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(given).__name__}")
        given = list(given)
    for kind in set(map(type, given)):
        if not issubclass(kind, Tensor):
            i = list(map(type, given)).index(kind)
            raise TypeError(f"{name}[{i}] must be a tensor, got {kind.__name__}")
    return given


def optional(name: str, given: TensorOrList | None) -> Sequence[Tensor]:
    """A list of tensors, empty for None."""
    return [] if given is None else tensors(name, given)


def numbers(name: str, given: float | Sequence[float]) -> list[float]:
    """A list of finite numbers; a bare number is a list of one."""
    if isinstance(given, str) or not isinstance(given, int | float | Sequence):
        raise TypeError(f"{name} must be a number or a list of numbers, got {type(given).__name__}")
    values = list(given) if isinstance(given, Sequence) else [given]
    if set(map(type, values)) != {float} or not all(map(math.isfinite, values)):
        for i, value in enumerate(values):
            checks.real(f"{name}[{i}]", value)
    return list(map(float, values))


def tensor(name: str, given: Tensor) -> Tensor:
    checks.instance(name, given, Tensor)
    return given


def losses(plus: Tensor | None, minus: Tensor | None, norm: Tensor) -> dict[str, Any]:
    """Losses of probes; None for both: guided noise, which has none."""
    if plus is None and minus is None:
        none = tensor("norm", norm).new_empty(0)
        return {"losses_plus": none, "losses_minus": none, "guided": True}
    for name, given in (("losses_plus", plus), ("losses_minus", minus)):
        if given is None:
            raise TypeError(f"{name} must be a Tensor where the other losses are one, got None")
        tensor(name, given)
    return {"losses_plus": plus, "losses_minus": minus, "guided": False}


def scalar(name: str, given: float | Tensor) -> Tensor:
    """A number of :data:`checks.SCALARS` as a 0-dim tensor."""
    if isinstance(given, Tensor):
        return given
    if name in LIMITS:
        given = signed64(check_range(name, given, LIMITS[name]))
    elif name == "lr":
        checks.finite(name, given)
    else:
        checks.unit_interval(name, given)
    return torch.scalar_tensor(given, dtype=checks.SCALARS[name])


def flat_grid(grid: Grid) -> dict[str, Any]:
    """The grid as schemas write it."""
    return {"qmin": grid.qmin, "qmax": grid.qmax, "offset": grid.offset, "r": grid.r}


def quantizer(grid: Grid, straight_through: StraightThrough) -> dict[str, Any]:
    """Grid and derivative as schemas write them; they must belong together."""
    checks.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)
    return {**flat_grid(grid), "straight_through": straight_through.variant}


def noisy(
    like: Sequence[Tensor],
    norm: Tensor,
    grid: Grid,
    straight_through: StraightThrough,
    one_minus_beta: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    layouts: Sequence[Layout] | None = None,
    epsilon_scale: float = 1.0,
    noise_factors: Tensor | None = None,
    count: int | None = None,
) -> dict[str, Any]:
    """Grid, noise and how it is mixed, as schemas write them; the noise is drawn for the first of ``like``.

    Tensor ids and layouts are None where ``like`` is held and has its own.
    """
    flat = quantizer(grid, straight_through)
    checks.finite("epsilon_scale", epsilon_scale)
    has_own = isinstance(like, Held) and tensor_ids is None and layouts is None
    ids, places = (None, None) if has_own else names(tensor_ids, layouts, like, count)
    return {
        **flat,
        "norm": tensor("norm", norm),
        "seed": scalar("seed", seed),
        "step": scalar("step", step),
        "one_minus_beta": scalar("one_minus_beta", one_minus_beta),
        "tensor_ids": ids,
        "layouts": places,
        "distribution": straight_through.distribution,
        "epsilon": straight_through.epsilon(grid, epsilon_scale),
        "noise_factors": None if noise_factors is None else tensor("noise_factors", noise_factors),
    }


def names(
    tensor_ids: Sequence[int] | None,
    layouts: Sequence[Layout] | None,
    like: Sequence[Tensor],
    count: int | None = None,
) -> tuple[list[int], list[int]]:
    """Tensor ids (by default 0, 1, 2, ...) and layouts (by default of whole parameters) of the first ones."""
    if isinstance(like, Held):
        tensor_ids = like.tensor_ids and like.tensor_ids[:count] if tensor_ids is None else tensor_ids
        layouts = like.layouts and like.layouts[:count] if layouts is None else layouts
    like = like[:count]
    listed = list(range(len(like))) if tensor_ids is None else ids(tensor_ids)
    if layouts is not None:
        return listed, [x for i, place in enumerate(layouts) for x in layout(f"layouts[{i}]", place)]
    return listed, [x for n in map(Tensor.numel, like) for x in (0, max(n, 1), max(n, 1))]


def ids(given: Sequence[int]) -> list[int]:
    """A list of tensor ids."""
    if not isinstance(given, Sequence):
        raise TypeError(f"tensor_ids must be a list of int, got {type(given).__name__}")
    integers("tensor_ids", given)
    return list(given)


def layout(name: str, given: Layout) -> Layout:
    """The three numbers (offset, inner, stride)."""
    if not isinstance(given, Sequence):
        raise TypeError(f"{name} must be (offset, inner, stride), got {given}")
    if len(given) != 3:
        raise ValueError(f"{name} must be (offset, inner, stride), got {given}")
    integers(name, given)
    return given


def integers(name: str, given: Sequence[int]) -> None:
    """Each is an int, or a symbolic one while a graph is traced."""
    for kind in set(map(type, given)) - {int}:
        if kind is bool or not issubclass(kind, int | torch.SymInt):
            i = list(map(type, given)).index(kind)
            raise TypeError(f"{name}[{i}] must be an int, got {kind.__name__}")
