"""hadamard_, hadamard: the Hadamard transform of blocks of the last dimension (docs/contract.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import check_name, select
from ..spec.dtypes import FLOATS
from ..spec.hadamard import check_block
from . import arguments, checks, memory, transforms
from .arguments import TensorOrList
from .listop import list_op, run_checked

# ---- a list, into given memory


def hadamard_(
    out: TensorOrList, tensors: TensorOrList, *, block: int = 128, backend: str | None = None
) -> None:
    """Write the orthonormal Hadamard transform of each block of the last dimension (contract section 4).

    ``y[i] = block ** -0.5 * sum_j (-1) ** popcount(i & j) * x[j]`` over each ``block`` consecutive elements:
    Sylvester's order (Sylvester 1867), by fast butterflies (Fino & Algazi 1976). It is its own inverse, up to
    rounding.

    Args:
        out: of the tensors' shapes, of one dtype: float32, bfloat16 or float16. ``out[i]`` may be
            ``tensors[i]``, which is then transformed in place.
        tensors: contiguous, of one dtype (float32, bfloat16 or float16) and device; the last dimension of each
            is a multiple of ``block``.
        block: 16, 32, 64, 128, 256, 512 or 1024.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    block = check_block(block)
    list_hadamard(arguments.tensors("out", out), arguments.tensors("tensors", tensors), block, backend)


def check_lists(out: Sequence[Tensor], tensors: Sequence[Tensor], block: int, name: str = "tensors") -> None:
    checks.tensor_list(name, tensors, FLOATS)
    checks.tensor_list("out", out, FLOATS, tensors)
    checks.whole_blocks(name, tensors, block)


def elsewhere(out: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, but none in the place of one that is its own output: that one is not read by another."""
    return [
        t.new_empty(0) if t.data_ptr() == o.data_ptr() and t.nbytes == o.nbytes else t
        for t, o in zip(tensors, out, strict=True)
    ]


@list_op(
    "fogzo::hadamard_",
    mutates_args=("out",),
    schema="(Tensor(a!)[] out, Tensor[] tensors, int block, str? backend) -> ()",
)
def list_hadamard(out: Sequence[Tensor], tensors: Sequence[Tensor], block: int, backend: str | None) -> None:
    def check() -> None:
        check_lists(out, tensors, block)
        memory.overlaps({"out": out}, {"tensors": elsewhere(out, tensors)}, memory.numels_of(tensors))

    if not tensors:
        return check()
    run_checked(select(backend, tensors[0].device), check, "hadamard_", out, tensors, block)


@list_hadamard.register_fake
def _(out: Sequence[Tensor], tensors: Sequence[Tensor], block: int, _backend: str | None) -> None:
    check_lists(out, tensors, block)


# ---- one tensor, differentiable


def hadamard(x: Tensor, *, block: int = 128, backend: str | None = None) -> Tensor:
    """The transform of :func:`hadamard_`, of the shape and dtype of ``x``; differentiable, to any order.

    The matrix is symmetric, so the gradient is the same transform of the gradient.

    Args:
        x: contiguous, float32, bfloat16 or float16; its last dimension is a multiple of ``block``.
        block: 16, 32, 64, 128, 256, 512 or 1024.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        RuntimeError: the backend is unavailable on the device.
    """
    checks.instance("x", x, Tensor)
    block = check_block(block)
    check_name(backend)
    run = Transformed.apply if transforms.active() else op
    found: Tensor = run(x, block, backend)
    return found


@torch.library.custom_op(
    "fogzo::hadamard", mutates_args=(), schema="(Tensor x, int block, str? backend) -> Tensor"
)
def op(x: Tensor, block: int, backend: str | None) -> Tensor:
    check_lists([x], [x], block, "x")
    out = torch.empty_like(x)
    select(backend, x.device).hadamard_([out], [x], block)
    return out


@op.register_fake
def _(x: Tensor, block: int, _backend: str | None) -> Tensor:
    check_lists([x], [x], block, "x")
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return op(grad.contiguous(), *ctx.options), None, None


op.register_autograd(_backward, setup_context=_setup)


@transforms.one_by_one
class Transformed(torch.autograd.Function):
    """The op under a transform of ``torch.func``."""

    @staticmethod
    def forward(x: Tensor, block: int, backend: str | None) -> Tensor:
        found: Tensor = op(x.contiguous(), block, backend)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return Transformed.apply(grads[0], *ctx.options), None, None
