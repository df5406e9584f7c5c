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
    """Sum of the squares of the gradient in units of delta, delta * g (contract section 1).

    Add those of several devices or lists before taking the root. The same bits in every run.

    Args:
        grads: straight-through gradients: contiguous, of one dtype (float32, bfloat16 or float16) and device.
        alphas: float32, one for each of ``grads``: one element, one per row, or one per group of a row.
        per_tensor: return a sum for each tensor, as :func:`noise_factors` takes them.
        backend: by default ``FOGZO_BACKEND``, else the best one available.

    Returns:
        float64 tensor on the gradients' device, 0-dim, or of shape (tensors,) with ``per_tensor``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.
        RuntimeError: the backend is unavailable on the device.
    """
    checks.instance("per_tensor", per_tensor, bool)
    return _guide(grads, alphas, grid, False, backend, per_tensor)


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


def noise_factors(sumsqs: Tensor, numels: Tensor | Sequence[int]) -> Tensor:
    """How large the noise of each tensor is, for noise in proportion to its own gradient (contract section 1).

    t_l = (N_l / N) sqrt(d / d_l), for tensors of d_l elements whose gradients have the norms N_l in units of
    delta. N and d are the norm and the number of elements of all whose N_l is not 0. The sum of d_l t_l^2 is d,
    as with noise of one size. A tensor whose gradient is 0 gets no noise. Nothing waits for the device.

    Args:
        sumsqs: N_l^2 of each tensor, float64, shape (tensors,), from :func:`guide_sumsq` with ``per_tensor``;
            the sum over its shards, where a tensor has some.
        numels: d_l of each whole tensor: ints, or an int64 tensor of shape (tensors,) on the same device, which
            a CUDA graph's capture needs.

    Returns:
        float32, shape (tensors,), on the device: ``noise_factors`` of the other ops. 0 for all tensors unless N
        is finite and > 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.

    Example:
        >>> import torch, fogzo_kernels.functional as ops
        >>> ops.noise_factors(torch.tensor([9.0, 16.0], dtype=torch.float64), [50, 50])
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


def _guide(
    grads: TensorOrList,
    alphas: TensorOrList,
    grid: Grid,
    root: bool,
    backend: str | None,
    per_tensor: bool = False,
) -> Tensor:
    checks.instance("grid", grid, Grid)
    result: Tensor = op(grads=grads, alphas=alphas, r=grid.r, root=root, backend=backend, per_tensor=per_tensor)
    return result


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
