"""straight_through_backward_: dL/dQ -> the straight-through gradient g (docs/contract.md, sections 1 and 4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec.grid import FLOATS, Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import FLAT, NO_SECOND, StraightThrough
from . import arguments
from .arguments import TensorOrList
from .listop import GRID, ListOp, OfOne


def straight_through_backward_(
    grads: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    transform: Hadamard | None = None,
    backend: str | None = None,
) -> None:
    """Multiply gradients with respect to Q by h'(latent), in place (contract section 1).

    Args:
        grads: dL/dQ, of the latents' shapes: contiguous, float32, bfloat16 or float16; they receive g.
        latents: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each latent: one element, one per row, or one per group of the last dimension.
        transform: of the quantizer: dL/dQ is with respect to the rotated Q, h' is taken at the rotated latent,
            and the result, H of the product, is with respect to the latent.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range; nothing is written.
        RuntimeError: the backend is unavailable on the device.
    """
    lists = {"grads": grads, "latents": latents, "alphas": alphas}
    quantizer = arguments.quantizer(grid, straight_through)
    op(**lists, **quantizer, backend=backend, block=block_of(transform))


op = ListOp(
    f"straight_through_backward_(Tensor(a!)[] grads, Tensor[] latents, Tensor[] alphas, {GRID},"
    " str straight_through, str? backend, int block=0) -> ()",
    {"latents": FLOATS, "grads": FLOATS},
)
#: The backward of quantize, on one tensor and not in place.
backward = OfOne(
    op,
    f"straight_through_backward(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through,"
    " str? backend, int block=0) -> Tensor",
    {"out": "latents"},
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, latent, alpha, *ctx.options = inputs
    ctx.save_for_backward(latent, alpha)


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of a loss with a derivative in it: h' times the gradient again, as this is linear in ``grad``."""
    variant, _, block = ctx.options[-3:]
    if block or variant not in FLAT:
        raise RuntimeError(NO_SECOND.format(f"a transformed {variant}" if block else variant))
    latent, alpha = ctx.saved_tensors
    return backward.op(grad, latent, alpha, *ctx.options), *[None] * (2 + len(ctx.options))


backward.op.register_autograd(_second, setup_context=_setup)
