"""straight_through_backward_: dL/dQ -> the straight-through gradient g (docs/contract.md, sections 1 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..spec.dtypes import FLOATS
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import GRID, list_op, run_checked


def straight_through_backward_(
    grads: TensorOrList,
    latents: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    straight_through: StraightThrough,
    backend: str | None = None,
) -> None:
    """Multiply gradients with respect to Q by h'(latent), in place (contract section 1).

    Args:
        grads: dL/dQ, of the latents' shapes: contiguous, float32, bfloat16 or float16; they receive g.
        latents: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each latent: one element, one per row, or one per group of the last dimension.
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
        straight_through.variant, backend,
    )  # fmt: skip


def check_lists(grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor]) -> None:
    checks.latents_and_alphas(latents, alphas)
    checks.tensor_list("grads", grads, FLOATS, latents)


@list_op(
    "fogzo::straight_through_backward_",
    mutates_args=("grads",),
    schema=f"(Tensor(a!)[] grads, Tensor[] latents, Tensor[] alphas, {GRID}, str straight_through,"
    " str? backend) -> ()",
)
def op(
    grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], qmin: int, qmax: int,
    offset: float, r: int, straight_through: str, backend: str | None,
) -> None:  # fmt: skip
    def check() -> None:
        check_lists(grads, latents, alphas)
        memory.alphas(alphas, r)
        memory.overlaps({"grads": grads}, {"latents": latents, "alphas": alphas}, memory.numels_of(latents))

    if not latents:
        return check()
    run_checked(
        select(backend, latents[0].device), check, "straight_through_backward_", grads, grads, latents, alphas,
        Grid(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through),
    )  # fmt: skip


@op.register_fake
def _(grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor], *_: Any) -> None:
    check_lists(grads, latents, alphas)


# ---- one tensor, not in place: the backward of quantize


@torch.library.custom_op(
    "fogzo::straight_through_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through, str? backend) -> Tensor",
)
def backward(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    straight_through: str, backend: str | None,
) -> Tensor:  # fmt: skip
    grad, out = grad.contiguous(), torch.empty_like(latent)

    def check() -> None:
        check_lists([grad], [latent], [alpha])
        memory.alphas([alpha], r)

    run_checked(
        select(backend, latent.device), check, "straight_through_backward_", [out], [grad], [latent], [alpha],
        Grid(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through),
    )  # fmt: skip
    return out


@backward.register_fake
def _(grad: Tensor, latent: Tensor, alpha: Tensor, *_: Any) -> Tensor:
    check_lists([grad.contiguous()], [latent], [alpha])
    return torch.empty_like(latent)
