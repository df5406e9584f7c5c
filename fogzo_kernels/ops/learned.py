"""learned_backward_: the straight-through gradient g, and that of a learned alpha (docs/contract.md, 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..spec.dtypes import FLOATS
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard, block_of
from ..spec.straight_through import NO_SECOND, StraightThrough
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import GRID, grid_of, list_op, run_checked


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
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range; nothing is
            written.
        RuntimeError: the backend is unavailable on the device.
    """
    arguments.quantizer(grid, straight_through)
    op(
        arguments.tensors("grads", grads), arguments.tensors("alpha_grads", alpha_grads),
        arguments.tensors("latents", latents), arguments.tensors("alphas", alphas),
        grid.qmin, grid.qmax, grid.offset, grid.r, straight_through.variant,
        arguments.numbers("factors", factors), backend, block_of(transform),
    )  # fmt: skip


def check_lists(
    grads: Sequence[Tensor], alpha_grads: Sequence[Tensor], latents: Sequence[Tensor],
    alphas: Sequence[Tensor], factors: Sequence[float], block: int,
) -> None:  # fmt: skip
    checks.latents_and_alphas(latents, alphas, block)
    checks.tensor_list("grads", grads, FLOATS, latents)
    checks.tensor_list("alpha_grads", alpha_grads, (torch.float32,), alphas)
    if len(factors) != len(latents):
        raise ValueError(f"factors must have {len(latents)} entries, got {len(factors)}")
    for i, factor in enumerate(factors):
        checks.real(f"factors[{i}]", factor)


@list_op(
    "fogzo::learned_backward_",
    mutates_args=("grads", "alpha_grads"),
    schema="(Tensor(a!)[] grads, Tensor(b!)[] alpha_grads, Tensor[] latents, Tensor[] alphas,"
    f" {GRID}, str straight_through, float[] factors, str? backend, int block=0) -> ()",
)
def op(
    grads: Sequence[Tensor], alpha_grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor],
    qmin: int, qmax: int, offset: float, r: int, straight_through: str, factors: Sequence[float],
    backend: str | None, block: int = 0,
) -> None:  # fmt: skip
    def check() -> None:
        check_lists(grads, alpha_grads, latents, alphas, factors, block)
        memory.alphas(alphas, r)
        memory.overlaps(
            {"grads": grads, "alpha_grads": alpha_grads}, {"latents": latents, "alphas": alphas},
            memory.numels_of(latents),
        )  # fmt: skip

    if not latents:
        return check()
    run_checked(
        select(backend, latents[0].device), check, "learned_backward_", grads, alpha_grads, grads, latents,
        alphas, grid_of(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through), factors, block,
    )  # fmt: skip


@op.register_fake
def _(
    grads: Sequence[Tensor], alpha_grads: Sequence[Tensor], latents: Sequence[Tensor], alphas: Sequence[Tensor],
    qmin: int, qmax: int, offset: float, r: int, straight_through: str, factors: Sequence[float],
    backend: str | None, block: int = 0,
) -> None:  # fmt: skip
    check_lists(grads, alpha_grads, latents, alphas, factors, block)


# ---- one tensor, not in place: the backward of quantize where alpha learns


@torch.library.custom_op(
    "fogzo::learned_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor latent, Tensor alpha, {GRID}, str straight_through, float factor,"
    " str? backend, int block=0) -> (Tensor, Tensor)",
)
def backward(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    straight_through: str, factor: float, backend: str | None, block: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad, out, alpha_grad = grad.contiguous(), torch.empty_like(latent), torch.empty_like(alpha)

    def check() -> None:
        check_lists([grad], [alpha_grad], [latent], [alpha], [factor], block)
        memory.alphas([alpha], r)

    run_checked(
        select(backend, latent.device), check, "learned_backward_", [out], [alpha_grad], [grad], [latent],
        [alpha], grid_of(qmin, qmax, offset, r), StraightThrough.of_variant(straight_through), [factor],
        block,
    )  # fmt: skip
    return out, alpha_grad


@backward.register_fake
def _(
    grad: Tensor, latent: Tensor, alpha: Tensor, qmin: int, qmax: int, offset: float, r: int,
    straight_through: str, factor: float, backend: str | None, block: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, alpha_grad = torch.empty_like(latent), torch.empty_like(alpha)
    check_lists([grad.contiguous()], [alpha_grad], [latent], [alpha], [factor], block)
    return out, alpha_grad


def _second(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(NO_SECOND.format("a learned scale"))


backward.register_autograd(_second)
