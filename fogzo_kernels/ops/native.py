"""What native code does beside the ops: look at gradients, count steps, loop over Python's objects."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.held import generations, native
from .tensor_list import TensorList

#: Facts of a tensor, where no native code tells of changes.
FACTS: Any = Tensor.data_ptr, Tensor.is_contiguous, *map(operator.attrgetter, ("shape", "dtype", "device"))


def state_of(tensors: TensorList) -> Any:
    """What changes when a tensor of the list lies elsewhere, or has another shape, dtype or device."""
    if tensors.plain and native() is not None:
        return generations([tensors])
    return [[*map(fact, tensors)] for fact in FACTS]


def inspected(tensors: Sequence[Tensor]) -> Tensor | None:
    """Of CPU tensors, int64 (3, n): the sum of the bits of each, whether it is not all 0, whether it is finite.

    None without the native module, or where memory lies in a way that it does not take.
    """
    if native() is None:
        return None
    out = torch.empty(3, len(tensors), dtype=torch.int64)
    try:
        torch.ops.fogzo_cpu.inspect(out, *_given(tensors))
    except RuntimeError:
        return None
    return out


def add_one(counts: Sequence[Tensor]) -> None:
    """Add 1 to each count, int64 and 0-dim."""
    if native() is None or counts[0].device.type != "cpu":
        torch._foreach_add_(list(counts), 1)
    else:
        torch.ops.fogzo_cpu.add_one(*_given(counts))
        torch.autograd.graph.increment_version(counts)


def outside(tensors: Sequence[Tensor], least: Sequence[Tensor], most: float) -> int | None:
    """How many elements of CPU tensors, float32, are below ``least`` or above ``most``, or NaN.

    None where native code cannot tell.
    """
    if native() is None or not (isinstance(tensors, TensorList) and isinstance(least, TensorList)):
        return None
    try:
        count: int = torch.ops.fogzo_cpu.outside([], [], most, [tensors.number, least.number])
    except RuntimeError:
        return None
    return count


def _given(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """A list as native ops take it: one that is prepared by its number."""
    return ([], [tensors.number]) if isinstance(tensors, TensorList) else (tensors,)


# ---- Python's objects, which a training loop looks at in each step


ABSENT, ANY = object(), object()


class Objects(NamedTuple):
    """Facts of dicts and objects, one after the other in each tuple.

    Attributes:
        entries: (dict, key, value) by identity; ``ABSENT`` for no such key, ``ANY`` for any value.
        sizes: (dict, number of its keys).
        attributes: (object, name, value) by identity.
        types: (object, its type).
    """

    entries: tuple[Any, ...]
    sizes: tuple[Any, ...]
    attributes: tuple[Any, ...]
    types: tuple[Any, ...]

    def holds(self) -> bool:
        """Whether all of it is so now."""
        if (module := native()) is not None:
            same: bool = module.unchanged(*self, ABSENT, ANY)
            return same

        def cut(facts: tuple[Any, ...], n: int) -> Iterator[tuple[Any, ...]]:
            return zip(*[iter(facts)] * n, strict=True)

        found = ((d.get(key, ABSENT), value) for d, key, value in cut(self.entries, 3))
        return (
            all(x is not ABSENT if value is ANY else x is value for x, value in found)
            and all(len(d) == size for d, size in cut(self.sizes, 2))
            and all(getattr(x, name) is value for x, name, value in cut(self.attributes, 3))
            and all(type(x) is kind for x, kind in cut(self.types, 2))
        )


def put(dicts: tuple[dict[str, Any], ...], key: str, values: Any) -> None:
    """Set a key of many dicts, each to its value of a tuple, or all to one value."""
    if (module := native()) is not None:
        module.put(dicts, key, values)
        return
    for d, value in zip(dicts, values if type(values) is tuple else [values] * len(dicts), strict=True):
        d[key] = value
