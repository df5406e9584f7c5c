"""Lists of tensors that native code holds too, so that one quick pass says whether any tensor has changed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec.noise import Layout


@functools.cache
def native() -> Any:
    """The native module, or None; ops then take the list as a plain one."""
    try:
        from .. import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _C


class Held(tuple[Tensor, ...]):
    """Tensors and the names of their noise, by default 0, 1, 2, ... and whole parameters.

    A backend gets it in the place of a list, with a draw that has the list's own names.
    """

    plain: bool  # no tensor is of a subclass
    tensor_ids: tuple[int, ...] | None
    layouts: tuple[Layout, ...] | None
    generation: int  # as the call found it; another one where any tensor was another

    @functools.cached_property
    def hold(self) -> Any:
        """Releases the list when it is freed; made by the first call, as a traced one has no use for it."""
        layouts = [x for layout in self.layouts or () for x in layout]
        return native().Hold(torch.ops.fogzo_cpu.hold(self, self.tensor_ids or (), layouts))

    @functools.cached_property
    def number(self) -> int:
        """That native code knows the list by."""
        number: int = self.hold.number
        return number


def generations(lists: Sequence[Sequence[Tensor]]) -> list[int] | None:
    """The states of lists, 0 for an empty one; None unless each of the others is held."""
    numbers = []
    for tensors in lists:
        if tensors and not isinstance(tensors, Held):
            return None
        numbers.append(tensors.number if isinstance(tensors, Held) else 0)
    states: list[int] = native().generations(numbers)
    for tensors, generation in zip(lists, states, strict=True):
        if isinstance(tensors, Held):
            tensors.generation = generation
    return states
