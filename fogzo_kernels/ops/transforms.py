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


def one_by_one(kind: type[Function]) -> type[Function]:
    """Let a Function be under vmap."""

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        def sample(i: int) -> Any:
            return kind.apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

        found = [sample(i) for i in range(info.batch_size)]
        if isinstance(found[0], tuple):
            return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])
        return torch.stack(found), 0

    kind.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return kind


def differentiable(
    op: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]], tensors: int
) -> Callable[..., Tensor]:
    """An op of that many tensors and other options, with its backward, for use under a transform.

    ``backward`` takes the gradient, the tensors, whether each needs a gradient, and the options.
    """

    @one_by_one
    class Gradients(Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return backward(*(a.contiguous() if isinstance(a, Tensor) else a for a in args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise RuntimeError(
                "a straight-through gradient must not be differentiated again: it has no derivative"
            )

    @one_by_one
    class Op(Function):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return op(*(a.contiguous() if isinstance(a, Tensor) else a for a in args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[:tensors])
            ctx.options = inputs[tensors:]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            needed = tuple(ctx.needs_input_grad[:tensors])
            found = iter(Gradients.apply(grads[0], *ctx.saved_tensors, *needed, *ctx.options))
            return *(next(found) if need else None for need in needed), *[None] * len(ctx.options)

    return Op.apply
