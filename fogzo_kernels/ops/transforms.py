"""The differentiable ops under ``torch.func``: grad, vmap, jacrev and the like.

An op of ``torch.library`` with a backward cannot be under them, a Function with a ``setup_context`` can. Where
tensors are batched, an op runs once for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def active() -> bool:
    """Whether a transform of ``torch.func`` runs."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap has given a tensor more dimensions than it shows."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_batchedtensor(tensor)


def transformed(op: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The op of one tensor, or more, under a transform."""

    @one_by_one
    class Transformed(Function):
        setup_context = staticmethod(setup)

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*[a.contiguous() if isinstance(a, Tensor) else a for a in args])

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Transformed.apply


def one_by_one(kind: type[Function]) -> type[Function]:
    """Let a Function be under vmap."""

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        def sample(i: int) -> Any:
            return kind.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        results = [sample(i) for i in range(info.batch_size)]
        if isinstance(results[0], tuple):
            return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
        return torch.stack(results), 0

    kind.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return kind
