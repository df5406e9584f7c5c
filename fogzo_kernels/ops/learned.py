"""learned_backward_: the straight-through gradient g, and that of a learned alpha (docs/contract.md, 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec.grid import FLOATS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import NO_SECOND, StraightThrough
from . import arguments, checks
from .arguments import TensorOrList
from .listop import GRID, ListOp, OfOne


def learned_backward_(
    grads: TensorOrList,
    alpha_grads: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    factors: float | Sequence[float],
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Multiply gradients with respect to Q by h'(latent), in place, and write the gradients of learned alphas.

    ``grads`` receive the result of :func:`straight_through_backward_`. The gradient of an alpha is its factor
    times the sum of dL/dQ * dQ/dalpha over the elements that share it. With z = latent / alpha - offset,
    rounding grids have LSQ's derivative (arXiv 1902.08153, section 2.1)::

        dQ/dalpha = code - z         where qmin <= z <= qmax
        dQ/dalpha = code + offset    elsewhere

    and the sign grid has dQ/dalpha = 2 (code + offset), which is -1 or +1 (contract, section 4). Every run
    gives the same bits, with any number of threads.

    Args:
        grads: dL/dQ, which receive dL/dlatent: of the latents' shapes, contiguous, float32, bfloat16 or
            float16.
        alpha_grads: outputs, float32, contiguous, of the shapes of ``alphas``.
        latents: weights before quantization: contiguous, one dtype (float32, bfloat16 or float16), one device.
        alphas: scales, float32, one tensor per latent: of one element, one per row, or one per group of the
            last dimension.
        grid: the values that a quantized weight may take, such as ``Grid.uniform(2)``.
        straight_through: the straight-through estimator; it must fit ``grid``.
        factors: a finite number per latent. LSQ's is 1 / sqrt(n qmax) for n elements that share an alpha.
        transform: the Hadamard transform of the quantizer, or None. Then dL/dQ belongs to the transformed
            weight, and ``grads`` receive the gradient of the latent, before the transform.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range. Nothing is written
            then.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> w, g, alpha = torch.tensor([0.3, -3.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5])
        >>> how = {"grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough("identity")}
        >>> alpha_grad = torch.empty(1)
        >>> fk.functional.learned_backward_(g, alpha_grad, w, alpha, factors=1.0, **how)
        >>> g, alpha_grad  # the second weight is clipped
        (tensor([1., 0.]), tensor([-1.6000]))
    """
    lists = {"grads": grads, "alpha_grads": alpha_grads, "latents": latents, "alphas": alphas}
    quantizer = arguments.quantizer(grid, straight_through)
    factors = arguments.numbers("factors", factors)
    op(**lists, **quantizer, factors=factors, backend=backend, block=block_of(transform))


def check(alpha_grads: Sequence[Tensor], alphas: Sequence[Tensor], factors: Sequence[float]) -> None:
    checks.tensor_list("alpha_grads", alpha_grads, (torch.float32,), alphas)
    if len(factors) != len(alphas):
        raise ValueError(f"factors must have {len(alphas)} entries, got {len(factors)}")
    for i, factor in enumerate(factors):
        checks.real(f"factors[{i}]", factor)


op = ListOp(
    "learned_backward_(Tensor(a!)[] grads, Tensor(b!)[] alpha_grads, Tensor[] latents, Tensor[] alphas,"
    f" {GRID}, str straight_through, float[] factors, str? backend, int block=0) -> ()",
    {"latents": FLOATS, "grads": FLOATS},
    check,
)
#: The backward of quantize where alpha learns, on one tensor and not in place.
backward = OfOne(
    op,
    f"learned_backward(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through, float factor,"
    " str? backend, int block=0) -> (Tensor, Tensor)",
    {"out": "latents", "alpha_grads": "alphas"},
)


def _second(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(NO_SECOND.format("a learned scale"))


backward.op.register_autograd(_second)
