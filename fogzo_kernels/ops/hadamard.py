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
    """Write the orthonormal Hadamard transform of each block of the last dimension.

    For each run of ``block`` elements, ``y[i] = block ** -0.5 * sum_j (-1) ** popcount(i & j) * x[j]``. The
    order is Sylvester's (1867), the algorithm butterflies (Fino and Algazi, 1976; contract, section 4). The
    transform is its own inverse, up to rounding.

    Args:
        out: outputs of the tensors' shapes, one dtype (float32, bfloat16 or float16). ``out[i]`` may be
            ``tensors[i]``.
        tensors: contiguous, one dtype (float32, bfloat16 or float16), one device. ``block`` divides the last
            dimension.
        block: 16, 32, 64, 128, 256, 512 or 1024.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> x = torch.zeros(16)
        >>> x[0] = 8.0
        >>> fk.functional.hadamard_(x, x, block=16)  # spreads the outlier
        >>> x[:4]
        tensor([2., 2., 2., 2.])
    """
    op_of_lists(out=out, tensors=tensors, block=check_block(block), backend=backend)


op_of_lists = ListOp(
    "hadamard_(Tensor(a!)[] out, Tensor[] tensors, int block, str? backend) -> ()",
    {"tensors": FLOATS, "out": FLOATS},
)


# ---- one tensor, differentiable


def hadamard(x: Tensor, *, block: int = 128, backend: str | None = None) -> Tensor:
    """Return the Hadamard transform of each block of the last dimension; differentiable to any order.

    :func:`hadamard_` has the formula. The matrix is symmetric, so the gradient is the same transform of the
    incoming gradient.

    Args:
        x: contiguous; float32, bfloat16 or float16. ``block`` divides the last dimension.
        block: 16, 32, 64, 128, 256, 512 or 1024.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> x = torch.eye(16)[0] * 8
        >>> y = fk.functional.hadamard(x, block=16)
        >>> y[:4], fk.functional.hadamard(y, block=16)[:4]
        (tensor([2., 2., 2., 2.]), tensor([8., 0., 0., 0.]))
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
