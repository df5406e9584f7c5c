"""guide_sumsq, guide_norm: the norm of the gradient in units of delta, N (docs/contract.md, 1 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..spec.dtypes import FLOATS
from ..spec.grid import Grid
from . import arguments, checks, memory
from .arguments import TensorOrList
from .listop import list_op, run_checked


def guide_sumsq(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """Sum of the squares of the gradient in units of delta, delta * g (contract section 1).

    Add those of several devices or lists before taking the root. The same bits in every run.

    Args:
        grads: straight-through gradients: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each of ``grads``: one element, one per row, or one per group of the last
            dimension.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Returns:
        0-dim float64 tensor on the gradients' device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        RuntimeError: the backend is unavailable on the device.
    """
    return _guide(grads, alphas, grid, False, backend)


def guide_norm(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """The guide norm N = ||delta * g|| over all tensors (paper section 3; contract section 1).

    Args:
        grads: straight-through gradients: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each of ``grads``: one element, one per row, or one per group of the last
            dimension.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Returns:
        0-dim float32 tensor on the gradients' device.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        RuntimeError: the backend is unavailable on the device.
    """
    return _guide(grads, alphas, grid, True, backend)


def _guide(grads: TensorOrList, alphas: TensorOrList, grid: Grid, root: bool, backend: str | None) -> Tensor:
    checks.instance("grid", grid, Grid)
    found: Tensor = op(
        arguments.tensors("grads", grads), arguments.tensors("alphas", alphas), grid.r, root, backend
    )
    return found


def check_lists(grads: Sequence[Tensor], alphas: Sequence[Tensor]) -> None:
    checks.tensor_list("grads", grads, FLOATS)
    checks.alpha_list(alphas, grads)


@list_op(
    "fogzo::guide_sumsq",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor[] alphas, int r, bool root, str? backend) -> Tensor",
)
def op(grads: Sequence[Tensor], alphas: Sequence[Tensor], r: int, root: bool, backend: str | None) -> Tensor:
    def check() -> None:
        check_lists(grads, alphas)
        memory.alphas(alphas, r)

    if not grads:  # on no device
        check()
        return torch.zeros((), dtype=torch.float32 if root else torch.float64)
    found: Tensor = run_checked(select(backend, grads[0].device), check, "guide_sumsq", grads, alphas, r, root)
    return found


@op.register_fake
def _(grads: Sequence[Tensor], alphas: Sequence[Tensor], r: int, root: bool, backend: str | None) -> Tensor:
    check_lists(grads, alphas)
    device = grads[0].device if grads else torch.device("cpu")
    return torch.empty((), dtype=torch.float32 if root else torch.float64, device=device)
