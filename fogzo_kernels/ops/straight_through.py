"""straight_through_backward_: dL/dQ -> the straight-through gradient g (docs/contract.md, sections 1 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..spec.dtypes import FLOATS
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import FLAT, NO_SECOND, StraightThrough
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import GRID, grid_of, list_op, run_checked


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
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    arguments.quantizer(grid, straight_through)
    op(
        arguments.tensors("grads", grads), arguments.tensors("latents", latents),
        arguments.tensors("alphas", alphas), grid.qmin, grid.qmax, grid.offset, grid.r,
        straight_through.variant, backend, block_of(transform),
    )  # fmt: skip


def check_lists(
    grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], block: int
) -> None:
    checks.latents_and_alphas(latents, alphas, block)
    checks.tensor_list("grads", grads, FLOATS, latents)


@list_op(
    "fogzo::straight_through_backward_",
    mutates_args=("grads",),
    schema=f"(Tensor(a!)[] grads, Tensor[] latents, Tensor[] alphas, {GRID}, str straight_through,"
    " str? backend, int block=0) -> ()",
)
def op(
    grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], qmin: int, qmax: int,
    offset: float, r: int, straight_through: str, backend: str | None, block: int = 0,
) -> None:  # fmt: skip
    def check() -> None:
        check_lists(grads, latents, alphas, block)
        memory.alphas(alphas, r)
        memory.overlaps({"grads": grads}, {"latents": latents, "alphas": alphas}, memory.numels_of(latents))

    if not latents:
        return check()
    run_checked(
        select(backend, latents[0].device), check, "straight_through_backward_", grads, grads, latents, alphas,
        grid_of(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through), block,
    )  # fmt: skip


@op.register_fake
def _(
    grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], qmin: int, qmax: int,
    offset: float, r: int, straight_through: str, backend: str | None, block: int = 0,
) -> None:  # fmt: skip
    check_lists(grads, latents, alphas, block)


# ---- one tensor, not in place: the backward of quantize


@torch.library.custom_op(
    "fogzo::straight_through_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through, str? backend,"
    " int block=0) -> Tensor",
)
def backward(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    straight_through: str, backend: str | None, block: int = 0,
) -> Tensor:  # fmt: skip
    grad, out = grad.contiguous(), torch.empty_like(latent)

    def check() -> None:
        check_lists([grad], [latent], [alpha], block)
        memory.alphas([alpha], r)

    run_checked(
        select(backend, latent.device), check, "straight_through_backward_", [out], [grad], [latent], [alpha],
        grid_of(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through), block,
    )  # fmt: skip
    return out


@backward.register_fake
def _(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    straight_through: str, backend: str | None, block: int = 0,
) -> Tensor:  # fmt: skip
    check_lists([grad.contiguous()], [latent], [alpha], block)
    return torch.empty_like(latent)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, latent, alpha, *ctx.options = inputs
    ctx.save_for_backward(latent, alpha)


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of a loss with a derivative in it: h' times the gradient again, as this is linear in ``grad``."""
    variant, _, block = ctx.options[-3:]
    if block or variant not in FLAT:
        raise RuntimeError(NO_SECOND.format(f"a transformed {variant}" if block else variant))
    latent, alpha = ctx.saved_tensors
    return backward(grad, latent, alpha, *ctx.options), *[None] * (2 + len(ctx.options))


backward.register_autograd(_second, setup_context=_setup)
