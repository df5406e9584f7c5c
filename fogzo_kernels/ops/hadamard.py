"""hadamard_, hadamard: the Hadamard transform of blocks of the last dimension (docs/contract.md, section 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import check_name
from ..spec.grid import FLOATS
from ..spec.hadamard import check_block
from . import checks, transforms
from .arguments import TensorOrList
from .listop import ListOp, OfOne

# ---- a list, into given memory


def hadamard_(
    out: TensorOrList, tensors: TensorOrList, *, block: int = 128, backend: str | None = None
) -> None:
    """Write the orthonormal Hadamard transform of each block of the last dimension (contract section 4).

    ``y[i] = block ** -0.5 * sum_j (-1) ** popcount(i & j) * x[j]`` over each ``block`` consecutive elements:
    Sylvester's order (1867), by butterflies (Fino & Algazi 1976). It is its own inverse, up to rounding.

    Args:
        out: of the tensors' shapes, of one dtype: float32, bfloat16 or float16. ``out[i]`` may be
            ``tensors[i]``, which is then transformed in place.
        tensors: contiguous, of one dtype (float32, bfloat16 or float16) and device; ``block`` divides each row.
        block: 16, 32, 64, 128, 256, 512 or 1024.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    op_of_lists(out=out, tensors=tensors, block=check_block(block), backend=backend)


op_of_lists = ListOp(
    "hadamard_(Tensor(a!)[] out, Tensor[] tensors, int block, str? backend) -> ()",
    {"tensors": FLOATS, "out": FLOATS},
)


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
    y: Tensor = (transformed if transforms.active() else op)(x, block, backend)
    return y


op = OfOne(op_of_lists, "hadamard(Tensor x, int block, str? backend) -> Tensor", {"out": "tensors"}).op


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return op(grad.contiguous(), *ctx.options), None, None


op.register_autograd(_backward, setup_context=_setup)
transformed: Any = transforms.transformed(
    op, _setup, lambda ctx, grad: (transformed(grad, *ctx.options), None, None)
)
