"""Which memory a launch may touch: the tensors of its op.

These are the op's arguments, the tensors that it makes (room for partial sums), and the tables of its plan. A
kernel that touches anything else fails.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_local = threading.local()
Span = tuple[int, int]


def tensors_in(x: object) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for one in x:
            yield from tensors_in(one)
    elif hasattr(x, "__dataclass_fields__"):
        yield from tensors_in([getattr(x, name) for name in x.__dataclass_fields__])


def span(t: torch.Tensor) -> Span:
    """Bytes of a contiguous tensor."""
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


class Making(TorchFunctionMode):
    """Notes the tensors that an op makes."""

    def __init__(self, found: list[torch.Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found.append(result)
        return result


def watched(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, whose launches may touch its tensors."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_local, "tensors", None)
        _local.tensors = found = [*tensors_in([args, kwargs])]
        try:
            with Making(found):
                return op(*args, **kwargs)
        finally:
            _local.tensors = before

    return call


def runs_on_cpu(unavailable: Callable[[torch.device], str | None]) -> Callable[[torch.device], str | None]:
    """A backend's ``unavailable``, for which the CPU is a device, too."""

    @functools.wraps(unavailable)
    def reason(device: torch.device) -> str | None:
        return None if device.type == "cpu" else unavailable(device)

    return reason


def watch(backend: ModuleType) -> None:
    """Watch every op of a backend, and the plans that it keeps."""
    from fogzo_kernels import backends

    for name in backends.FUNCTIONS:
        if name != "unavailable":
            setattr(backend, name, watched(getattr(backend, name)))
    if hasattr(backend, "ModuleWeight"):
        for name in ("quantize", "backward"):
            setattr(backend.ModuleWeight, name, watched(getattr(backend.ModuleWeight, name)))
    watch_plans()


@functools.cache
def watch_plans() -> None:
    from fogzo_kernels.backends.gpu import cells, plans

    kept = plans.kept

    @functools.wraps(kept)
    def noted(*args: Any, **kwargs: Any) -> Any:
        tensors = getattr(_local, "tensors", None)
        before = len(tensors or ())
        found = kept(*args, **kwargs)
        if tensors is not None:
            tensors[before:] = tensors_in(found)  # not the larger memory that they are parts of
        return found

    plans.kept = cells.kept = noted


def touchable(arguments: object = ()) -> list[Span]:
    """Of the op at hand and of a launch's own arguments: spans, sorted, those that touch joined."""
    tensors = [*(getattr(_local, "tensors", None) or ()), *tensors_in(arguments)]
    joined: list[Span] = []
    for begin, end in sorted({span(t) for t in tensors if t.numel()}):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined
