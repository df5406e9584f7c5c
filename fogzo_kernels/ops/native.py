"""What native code does with lists on the CPU beside the ops: it looks at gradients, and it counts steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.held import native
from .tensor_list import TensorList


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


def _given(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """A list as native ops take it: one that is prepared by its number."""
    return ([], [tensors.number]) if isinstance(tensors, TensorList) else (tensors,)
