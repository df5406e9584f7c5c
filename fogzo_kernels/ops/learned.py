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
    """Multiply gradients with respect to Q by h'(latent), in place, and write the gradients of the alphas.

    ``grads`` receive what :func:`straight_through_backward_` gives. An alpha's gradient is its factor times the
    sum of dL/dQ * dQ/dalpha over the elements that share it. On rounding grids (LSQ, Esser et al., ICLR 2020,
    arXiv 1902.08153), with z = latent / alpha - offset and code that of Q::

        dQ/dalpha = code - z         where qmin <= z <= qmax, both ends included
        dQ/dalpha = code + offset    elsewhere

    and on the sign grid dQ/dalpha = 2 (code + offset), -1 or +1 (contract section 4). One pass; the same bits
    in every run, for any number of threads.

    Args:
        grads: dL/dQ, of the latents' shapes: contiguous, float32, bfloat16 or float16; they receive g.
        alpha_grads: float32, contiguous, one of the shape of each of ``alphas``. They are overwritten.
        latents: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each latent: one element, one per row, or one per group of the last dimension.
        factors: a finite number for each latent, LSQ's 1 / sqrt(elements that share an alpha * qmax), say.
        transform: of the quantizer: dL/dQ is with respect to the rotated Q, h' is taken at the rotated latent,
            and what ``grads`` receive, H of the product, is with respect to the latent.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
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
