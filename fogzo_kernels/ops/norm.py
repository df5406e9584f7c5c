"""guide_sumsq, guide_norm: the norm of the gradient in units of delta, N (docs/contract.md, 1 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.grid import FLOATS, Grid
from . import checks
from .arguments import TensorOrList
from .listop import Call, ListOp


def guide_sumsq(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """Sum of the squares of the gradient in units of delta, delta * g (contract section 1).

    Add those of several devices or lists before taking the root. The same bits in every run.

    Args:
        grads: straight-through gradients: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each of ``grads``: one element, one per row, or one per group of a row.
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
        alphas: float32, one for each of ``grads``: one element, one per row, or one per group of a row.
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
    result: Tensor = op(grads=grads, alphas=alphas, r=grid.r, root=root, backend=backend)
    return result


def zero(call: Call) -> Tensor:
    device = call["grads"][0].device if call["grads"] else torch.device("cpu")
    return torch.zeros((), dtype=torch.float32 if call["root"] else torch.float64, device=device)


op = ListOp(
    "guide_sumsq(Tensor[] grads, Tensor[] alphas, int r, bool root, str? backend) -> Tensor",
    {"grads": FLOATS},
    result=zero,
)
