"""Public arguments as the ops take them: lists of tensors, tensors for numbers, flat layouts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.grid import Grid
from ..spec.noise import MAX_SEED, MAX_STEP, Layout, check_range, signed64
from ..spec.straight_through import StraightThrough
from . import checks
from .listop import KEPT

TensorOrList = Tensor | Sequence[Tensor]


def tensors(name: str, given: TensorOrList) -> list[Tensor]:
    """A list of tensors; a bare tensor is a list of one."""
    if type(given) is not list and not isinstance(given, Tensor | Sequence):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(given).__name__}")
    found = [given] if isinstance(given, Tensor) else list(given)
    for kind in set(map(type, found)):
        if not issubclass(kind, Tensor):
            i = list(map(type, found)).index(kind)
            raise TypeError(f"{name}[{i}] must be a tensor, got {kind.__name__}")
    return found


def numbers(name: str, given: float | Sequence[float]) -> list[float]:
    """A list of finite numbers; a bare number is a list of one."""
    if isinstance(given, str) or not isinstance(given, int | float | Sequence):
        raise TypeError(f"{name} must be a number or a list of numbers, got {type(given).__name__}")
    found = list(given) if isinstance(given, Sequence) else [given]
    for i, value in enumerate(found):
        checks.real(f"{name}[{i}]", value)
    return list(map(float, found))


def tensor(name: str, given: Tensor) -> Tensor:
    checks.instance(name, given, Tensor)
    return given


def optional(name: str, given: TensorOrList | None) -> list[Tensor]:
    """A list of tensors, empty for None."""
    return [] if given is None else tensors(name, given)


def seed(given: int | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    return torch.tensor(signed64(check_range("seed", given, MAX_SEED)), dtype=torch.int64)


def step(given: int | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    return torch.tensor(check_range("step", given, MAX_STEP), dtype=torch.int64)


def one_minus_beta(given: float | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    checks.unit_interval("one_minus_beta", given)
    return torch.tensor(given, dtype=torch.float64)


def lr(given: float | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    checks.finite("lr", given)
    return torch.tensor(given, dtype=torch.float64)


def optimizer_step(given: int | Tensor) -> Tensor:
    if isinstance(given, Tensor):
        return given
    return torch.tensor(check_range("optimizer_step", given, 2**63), dtype=torch.int64)


def quantizer(grid: Grid, straight_through: StraightThrough) -> None:
    """The two are what they should be and belong together."""
    checks.instance("straight_through", straight_through, StraightThrough)
    straight_through.check_grid(grid)


def epsilon(straight_through: StraightThrough, grid: Grid, epsilon_scale: float) -> float:
    checks.finite("epsilon_scale", epsilon_scale)
    return straight_through.epsilon(grid, epsilon_scale)


def names(
    tensor_ids: Sequence[int] | None, layouts: Sequence[Layout] | None, like: list[Tensor]
) -> tuple[list[int], list[int]]:
    """Tensor ids (by default 0, 1, 2, ...) and layouts (by default of whole parameters)."""
    if tensor_ids is not None and not isinstance(tensor_ids, Sequence):
        raise TypeError(f"tensor_ids must be a list of int, got {type(tensor_ids).__name__}")
    ids = list(range(len(like))) if tensor_ids is None else list(tensor_ids)
    integers("tensor_ids", ids)
    if layouts is not None:
        return ids, [x for i, one in enumerate(layouts) for x in layout(f"layouts[{i}]", one)]
    numels = tuple(map(Tensor.numel, like))
    known = set(map(type, numels)) <= {int}  # not symbolic
    return ids, list((_whole if known else _whole.__wrapped__)(numels))


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


@functools.lru_cache(KEPT)
def _whole(numels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x for n in numels for x in (0, max(n, 1), max(n, 1)))
