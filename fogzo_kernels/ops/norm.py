"""guide_sumsq, guide_norm: the norm of the gradient in units of delta, N (docs/contract.md, 1 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.grid import FLOATS, Grid
from . import arguments, checks
from .arguments import TensorOrList
from .listop import Call, ListOp


def guide_sumsq(
    grads: TensorOrList,
    alphas: TensorOrList,
    *,
    grid: Grid,
    per_tensor: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return the sum of squares of the gradient in units of delta, N^2 (contract, section 1).

    Add the results of several devices or lists before you take the root. Every run gives the same bits.

    Args:
        grads: straight-through gradients: contiguous, one dtype (float32, bfloat16 or float16), one device.
        alphas: scales, float32, one per gradient: of one element, one per row, or one per group of a row.
        grid: the grid of the quantizer, which fixes delta: 2 alpha for ``Grid.sign()``, else alpha.
        per_tensor: return one sum per tensor, for :func:`noise_factors`.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Returns:
        A float64 tensor on the gradients' device, 0-dim, or of shape (tensors,) with ``per_tensor``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> g, alpha = torch.tensor([3.0, -4.0]), torch.tensor([0.5])
        >>> fk.functional.guide_sumsq(g, alpha, grid=fk.Grid.uniform(2))
        tensor(6.2500, dtype=torch.float64)
    """
    checks.instance("per_tensor", per_tensor, bool)
    checks.instance("grid", grid, Grid)
    sums: Tensor = op(grads=grads, alphas=alphas, r=grid.r, root=False, backend=backend, per_tensor=per_tensor)
    return sums


def guide_norm(grads: TensorOrList, alphas: TensorOrList, *, grid: Grid, backend: str | None = None) -> Tensor:
    """Return the guide norm N = ||delta g|| over all tensors (arXiv 2510.23926, section 3).

    Args:
        grads: straight-through gradients: contiguous, one dtype (float32, bfloat16 or float16), one device.
        alphas: scales, float32, one per gradient: of one element, one per row, or one per group of a row.
        grid: the grid of the quantizer, which fixes delta: 2 alpha for ``Grid.sign()``, else alpha.
        backend: name of a backend; None takes the variable ``FOGZO_BACKEND``, else the best one for the device.

    Returns:
        A 0-dim float32 tensor on the gradients' device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or range.
        RuntimeError: the backend cannot run on the device.

    Example:
        >>> g, alpha = torch.tensor([3.0, -4.0]), torch.tensor([0.5])
        >>> fk.functional.guide_norm(g, alpha, grid=fk.Grid.uniform(2))
        tensor(2.5000)
    """
    checks.instance("grid", grid, Grid)
    norm: Tensor = op(grads=grads, alphas=alphas, r=grid.r, root=True, backend=backend, per_tensor=False)
    return norm


def noise_factors(sumsqs: Tensor, numels: Tensor | Sequence[int]) -> Tensor:
    """Return how large the noise of each tensor is, in proportion to the norm of its own gradient.

    t_l = (N_l / N) sqrt(d / d_l), for tensors of d_l elements whose gradients have the norms N_l in units of
    delta (contract, section 1). N and d are the norm and the number of elements of all tensors with N_l > 0.
    The sum of d_l t_l^2 is d, as with noise of one size. A tensor without gradient gets no noise. The call does
    not wait for the device.

    Args:
        sumsqs: N_l^2 of each tensor, from :func:`guide_sumsq` with ``per_tensor=True``: float64, shape
            (tensors,). Add up the shards of a tensor before.
        numels: d_l of each whole tensor: ints, or an int64 tensor of shape (tensors,) on the same device. The
            capture of a CUDA graph needs the tensor.

    Returns:
        A float32 tensor of shape (tensors,) on the device, all 0 unless N is finite and > 0. Pass it to the
        other ops as ``noise_factors``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device.

    Example:
        >>> fk.functional.noise_factors(torch.tensor([9.0, 16.0], dtype=torch.float64), [50, 50])
        tensor([0.8485, 1.1314])
    """
    arguments.tensor("sumsqs", sumsqs)
    checks.vector("sumsqs", sumsqs, torch.float64, None, sumsqs.device)
    if not isinstance(numels, Tensor):
        arguments.integers("numels", numels)
        numels = torch.tensor(numels, dtype=torch.int64).to(sumsqs.device, non_blocking=True)
    checks.vector("numels", numels, torch.int64, len(sumsqs), sumsqs.device)
    total = sumsqs.sum()
    usable = torch.isfinite(total) & (total > 0)
    share = sumsqs / torch.where(usable, total, 1.0)
    d = (numels * (sumsqs > 0)).sum()
    return torch.where(usable, share * d / numels.clamp(min=1), 0.0).sqrt().float()


def zero(call: Call) -> Tensor:
    grads = call["grads"]
    shape = (len(grads),) if call["per_tensor"] else ()
    dtype = torch.float32 if call["root"] else torch.float64
    return torch.zeros(shape, dtype=dtype, device=grads[0].device if grads else torch.device("cpu"))


op = ListOp(
    "guide_sumsq(Tensor[] grads, Tensor[] alphas, int r, bool root, str? backend, bool per_tensor=False)"
    " -> Tensor",
    {"grads": FLOATS},
    result=zero,
)
